//! Accelerators by claim: where they fit, and what is made for them.

use super::*;

#[test]
fn accelerators_are_claimed_where_they_are_offered_by_claims() {
    let (a, of_a) = claimed("a", "p", 4);
    let (b, of_b) = claimed("b", "q", 8);
    let fleet = fleet_of(vec![a, b, h100("c", "plugin", json!({}))], &[of_a, of_b], "");
    let claims = |more: Value| {
        let mut hardware = json!({"accelerator": "nvidia-h100", "allocation": "ResourceClaim"});
        crate::fixtures::merge(&mut hardware, more);
        hardware
    };
    let there = |pool: &str, per_node| Ok((pool.to_owned(), 1, per_node, Seat::There));
    assert_eq!(place(claims(json!({"acceleratorsPerNode": 8})), &fleet), there("q", 8));
    // The device plugin's nodes are another world.
    let plugin = json!({"accelerator": "nvidia-h100", "acceleratorsPerNode": 8});
    assert_eq!(place(plugin, &fleet), there("plugin", 8));
    let wanted = demand(
        claims(json!({"acceleratorsPerNode": 4, "interconnect": {"infiniband": "Required"}})),
        Engine::Container,
    );
    let placement = fit::place(&wanted, &fleet, engine::OFFERED).expect("it fits");
    let claim = placement.claim.as_ref().expect("a claim");
    assert_eq!((claim.kind.class.as_str(), claim.count), ("gpu.nvidia.com", 4));
    // InfiniBand stays with its device plugin.
    assert_eq!(placement.resources, [("rdma/ib".to_owned(), 8)].into());
    assert!(placement.finding().message.contains("4 nvidia-h100 by claim"));

    let mig = slice("m", "gpu.nvidia.com", 7, json!({"type": "mig", "profile": "1g.10gb"}));
    let none = json!({"status": {"allocatable": {"nvidia.com/gpu": null}}});
    let cut = fleet_of(vec![h100("m", "mig", none.clone())], &[mig], "");
    let part = |profile: &str| claims(json!({"migProfile": profile, "acceleratorsPerNode": 2}));
    assert_eq!(place(part("1g.10gb"), &cut), there("mig", 2));

    let amd = node(
        "x",
        json!({"amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM"}),
        json!({}),
        json!({}),
    );
    let whole = slice("x", "gpu.amd.com", 8, json!({"type": "amdgpu"}));
    let amd_hardware = json!({"accelerator": "amd-mi300x", "acceleratorsPerNode": 8, "allocation": "ResourceClaim"});
    assert_eq!(
        place(amd_hardware.clone(), &fleet_of(vec![amd.clone()], &[whole], "")),
        there("", 8)
    );
    // Its partitions are of the same DeviceClass.
    let partitions = slice("x", "gpu.amd.com", 64, json!({"type": "amdgpu-partition"}));
    assert!(place(amd_hardware, &fleet_of(vec![amd], &[partitions], "")).is_err());

    let pool = "pools: [{name: big, accelerator: nvidia-h100, acceleratorsPerNode: 8, allocation: ResourceClaim, maxNodes: 2, \
                cpu: '90', memory: 1800Gi, mig: {1g.10gb: 7}}]";
    let grows = |per_node| Ok(("big".to_owned(), 1, per_node, Seat::Grows));
    assert_eq!(
        place(claims(json!({"acceleratorsPerNode": 8})), &fleet_with(vec![], pool)),
        grows(8)
    );
    assert_eq!(place(part("1g.10gb"), &fleet_with(vec![], pool)), grows(2));

    let old = Fleet {
        serves_claims: false,
        ..fleet.clone()
    };
    for (hardware, fleet, reason, says) in [
        (
            claims(json!({"acceleratorsPerNode": 16})),
            &fleet,
            Reason::NoNodeFits,
            "with at most 8 of the 16",
        ),
        (
            claims(json!({})),
            &fleet_with(vec![h100("c", "p", json!({}))], ""),
            Reason::NoNodeFits,
            "write allocation: DevicePlugin",
        ),
        (
            json!({"accelerator": "nvidia-h100"}),
            &fleet_of(vec![h100("a", "p", none.clone())], &[claimed("a", "p", 8).1], ""),
            Reason::NoNodeFits,
            "write allocation: ResourceClaim",
        ),
        (
            json!({"accelerator": "nvidia-h100"}),
            &fleet_with(vec![h100("a", "p", none)], ""),
            Reason::NoNodeFits,
            "see that its device plugin runs",
        ),
        (part("3g.40gb"), &cut, Reason::NoNodeFits, "there is 1g.10gb"),
        (
            claims(json!({})),
            &old,
            Reason::NoNodeFits,
            "serves no resource.k8s.io/v1",
        ),
        (
            claims(json!({"accelerator": "cpu"})),
            &fleet,
            Reason::SpecInvalid,
            "is not claimed",
        ),
        (
            claims(json!({"accelerator": "gaudi3"})),
            &fleet_with(
                vec![],
                "accelerators: [{name: gaudi3, family: Rocm, resource: habana.ai/gaudi, marks: [{key: a, values: [b]}]}]",
            ),
            Reason::SpecInvalid,
            "no DeviceClass of gaudi3 is known: write DevicePlugin",
        ),
    ] {
        let (got, message) = place(hardware.clone(), fleet).expect_err(&hardware.to_string());
        assert_eq!(got, reason, "{hardware}: {message}");
        assert!(message.contains(says), "{hardware}: {message}");
    }
}

#[test]
fn an_attempt_claims_its_gpu_by_a_template_of_its_name_and_requests_none() {
    let (a, of_a) = claimed("a", "p", 8);
    let observed = Observed {
        fleet: Arc::new(fleet_of(vec![a], &[of_a], "")),
        ..around(vec![])
    };
    let job = pretrain(
        "p",
        json!({"hardware": {"accelerator": "nvidia-h100", "allocation": "ResourceClaim"}}),
    );
    let planned = job.plan(&job.check(&observed, &gpu_env()), &observed, at(NOW));
    let attempt = planned.start.expect("an attempt");
    let claims = json!(attempt.claims.expect("a claim template"));
    let made = json!(attempt.job);
    assert_eq!(
        claims["metadata"],
        json!(attempt.config_map)["metadata"],
        "same name, labels and owner"
    );
    assert_eq!(claims["spec"]["metadata"]["labels"], claims["metadata"]["labels"]);
    assert_eq!(claims["spec"]["spec"]["devices"]["requests"][0]["exactly"]["count"], 1);
    let pod = &made["spec"]["template"]["spec"];
    assert_eq!(
        pod["resourceClaims"],
        json!([{"name": "accelerators", "resourceClaimTemplateName": made["metadata"]["name"]}])
    );
    let resources = &pod["containers"][0]["resources"];
    assert_eq!(resources["claims"], json!([{"name": "accelerators"}]));
    assert!(!resources.to_string().contains("nvidia.com"), "{resources}");

    // Both at once fit on no node.
    let both = json!({"hardware": {"accelerator": "nvidia-h100", "allocation": "ResourceClaim"},
        "pod": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}});
    let both = pretrain("p", both);
    assert!(matches!(both.check(&observed, &gpu_env()),
        Err(Refusal::Spec(Reason::SpecInvalid, message)) if message.contains("leave one of them out")));
}

/// The Deployment with the annotation that says which claim templates are there, and those that go.
#[test]
fn a_services_claims_of_before_stay_until_no_pod_of_before_is_left() {
    let (a, of_a) = claimed("a", "p", 8);
    let observed = |deployment| Observed {
        fleet: Arc::new(fleet_of(
            vec![a.clone(), h100("b", "q", json!({}))],
            std::slice::from_ref(&of_a),
            "",
        )),
        deployment,
        ..around(vec![])
    };
    let planned = |hardware: Value, there: Option<&Value>| {
        let container = json!({"container": {"image": "example.org/llm:1"}});
        let service = inference("s", json!({"hardware": hardware, "engine": container}));
        let observed = observed(there.map(|there| serde_json::from_value(there.clone()).expect("a Deployment")));
        service.plan(&service.check(&observed, &gpu_env()), &observed, at(NOW))
    };
    let by_claim =
        |each: u32| json!({"accelerator": "nvidia-h100", "acceleratorsPerNode": each, "allocation": "ResourceClaim"});
    let plugin = json!({"accelerator": "nvidia-h100", "allocation": "DevicePlugin"});
    let claims = |deployment: &Value| deployment["metadata"]["annotations"]["strata.dev/claims"].clone();
    let mut there = json!(planned(by_claim(1), None).deployment);
    let one = claims(&there);
    assert!(one.as_str().is_some_and(|name| name.starts_with("s-")), "{one}");
    let pod = &there["spec"]["template"]["spec"];
    assert_eq!(pod["resourceClaims"][0]["resourceClaimTemplateName"], one);
    assert!(!pod["containers"][0]["resources"].to_string().contains("nvidia.com"));

    let status = |updated: u32, replicas: u32| json!({"observedGeneration": 2, "updatedReplicas": updated, "replicas": replicas});
    there["metadata"]["generation"] = json!(2);
    there["status"] = status(2, 2);
    for hardware in [by_claim(2), plugin] {
        let next = planned(hardware.clone(), Some(&there));
        let mut after = json!(next.deployment);
        let both = claims(&after);
        assert!(
            next.old_claims.is_empty()
                && both
                    .as_str()
                    .is_some_and(|both| both.contains(one.as_str().expect("a name"))),
            "{both}"
        );
        after["metadata"]["generation"] = json!(2);
        for (updated, replicas, is_done) in [(0, 2, false), (1, 3, false), (2, 2, true)] {
            after["status"] = status(updated, replicas);
            let next = planned(hardware.clone(), Some(&after));
            let gone: Vec<Value> = next.old_claims.iter().map(|name| json!(name)).collect();
            assert_eq!(
                gone,
                if is_done { vec![one.clone()] } else { vec![] },
                "{hardware} {updated} of {replicas}"
            );
            let kept = claims(&json!(next.deployment));
            assert_eq!(
                kept.to_string().contains(one.as_str().expect("a name")),
                !is_done,
                "{kept}"
            );
        }
        // Not yet what the server answers to.
        after["status"]["observedGeneration"] = json!(1);
        assert!(planned(hardware, Some(&after)).old_claims.is_empty());
    }
}
