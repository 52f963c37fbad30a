//! Containers, queues and several nodes: what is made for them, and who may start and stop what.

use k8s_openapi::api::batch::v1::Job;
use kube::ResourceExt;
use serde_json::{Value, json};
use strata_api::{PretrainJob, Reason};
use strata_contract::{NODE_RANK_ENV, OUTPUT_ENV, STATE_ENV};

use crate::engine::kind::{Kind, Observed, QueueSays, ResourceKind};
use crate::fixtures::{Attempt, IMAGE, NOW, at, env, good_report, observe, pretrain, published, started, to};
use crate::run::attempt::{State, state};
use crate::workload::{jobset, labels};

fn around() -> Observed {
    Observed {
        upstream: [(to(ResourceKind::Dataset, "plays"), published('a'))].into(),
        ..Observed::default()
    }
}

fn container(change: Value) -> Value {
    let mut container = json!({"image": "example.org/jax:1", "command": ["python3", "train.py"], "args": ["--out=$(STRATA_OUTPUT_DIR)"]});
    crate::fixtures::merge(&mut container, change);
    json!({"engine": {"container": container}})
}

fn run_id(resource: &PretrainJob) -> String {
    resource.check(&around(), &env()).expect("a good spec").run_id
}

fn first_attempt(resource: &PretrainJob, observed: &Observed) -> Job {
    let checked = resource.check(observed, &env());
    started(resource.plan(&checked, observed, at(NOW)))
}

#[test]
fn what_determines_a_containers_result_is_in_the_runs_id_and_what_does_not_is_not() {
    let id = |change: Value| run_id(&pretrain("p", change));
    let own = id(json!({}));
    assert_eq!(own, id(json!({"engine": {"candle": {}}})), "the default, written down");
    let theirs = id(container(json!({})));
    assert_ne!(theirs, own);
    for change in [
        json!({"image": "example.org/jax:2"}),
        json!({"command": ["python3", "other.py"]}),
        json!({"args": []}),
        json!({"env": [{"name": "XLA_FLAGS", "value": "--x"}]}),
    ] {
        assert_ne!(id(container(change.clone())), theirs, "{change}");
    }
    for change in [
        json!({"sharedMemory": "8Gi", "scratch": "50Gi"}),
        json!({"runAsUser": 0, "writableRootFilesystem": true}),
    ] {
        assert_eq!(id(container(change.clone())), theirs, "{change}");
    }
    let mut queued = container(json!({}));
    queued["scheduler"] = json!({"kubernetes": {"queue": "q"}});
    assert_eq!(id(queued), theirs);
}

#[test]
fn a_container_finds_the_shim_its_folders_and_what_it_asked_of_its_pod() {
    let resource = pretrain(
        "p",
        container(
            json!({"env": [{"name": "MODE", "value": "x"}], "sharedMemory": "8Gi", "scratch": "5Gi", "runAsUser": 0,
            "writableRootFilesystem": true}),
        ),
    );
    let job = first_attempt(&resource, &around());
    let spec = job.spec.expect("a spec").template.spec.expect("a pod");
    let init = &spec.init_containers.as_ref().expect("the shim")[0];
    assert_eq!(init.image.as_deref(), Some(IMAGE));
    assert_eq!(
        init.command.as_ref().expect("a command"),
        &["strata-shim", "inject", "/strata/shim"]
    );
    let container = &spec.containers[0];
    assert_eq!(container.image.as_deref(), Some("example.org/jax:1"));
    let command = container.command.as_ref().expect("a command").join(" ");
    assert_eq!(
        command,
        "/strata/shim/ld.so --library-path /strata/shim /strata/shim/strata-shim run -- python3 train.py \
         --out=$(STRATA_OUTPUT_DIR)"
    );
    let env = container.env.as_ref().expect("variables");
    let value = |name: &str| {
        let variable = env.iter().find(|variable| variable.name == name);
        variable.and_then(|variable| variable.value.clone()).unwrap_or_default()
    };
    let run = format!("/strata/volumes/artifacts/ns/pretrainjob/p/{}", run_id(&resource));
    assert_eq!(
        value(OUTPUT_ENV),
        format!("{run}/attempts/$(STRATA_ATTEMPT_ID)/content")
    );
    assert_eq!(value(STATE_ENV), format!("{run}/state"));
    assert_eq!((value(NODE_RANK_ENV).as_str(), value("MODE").as_str()), ("0", "x"));
    assert_eq!(value("HOME"), "/tmp");
    let place = |name: &str| env.iter().position(|variable| variable.name == name);
    assert!(
        place("STRATA_ATTEMPT_ID") < place(OUTPUT_ENV),
        "only what comes before is put in its place"
    );
    let security = container.security_context.as_ref().expect("a context");
    assert_eq!(
        (
            security.run_as_user,
            security.run_as_non_root,
            security.read_only_root_filesystem
        ),
        (Some(0), Some(false), Some(false))
    );
    let resources = container.resources.as_ref().expect("requests");
    assert!(resources.limits.is_none(), "Strata's own limit would be wrong");
    let size = |name: &str| {
        let volume = spec.volumes.iter().flatten().find(|volume| volume.name == name)?;
        volume.empty_dir.as_ref()?.size_limit.clone()
    };
    assert_eq!(size("tmp").map(|size| size.0), Some("5Gi".into()));
    assert_eq!(size("shm").map(|size| size.0), Some("8Gi".into()));
}

#[test]
fn a_size_that_is_none_is_refused_by_its_field() {
    let resource = pretrain("p", container(json!({"scratch": "0"})));
    let refusal = format!("{:?}", resource.check(&around(), &env()).expect_err("no size"));
    assert!(
        refusal.contains("spec.engine.container.scratch must be a size above 0"),
        "{refusal}"
    );
}

fn in_queue(change: Value) -> PretrainJob {
    let mut spec = json!({"scheduler": {"kubernetes": {"queue": "research"}}});
    crate::fixtures::merge(&mut spec, change);
    pretrain("p", spec)
}

/// What there is after the first attempt was made, and what Kueue says of it.
fn queued(says: Option<(bool, &str)>) -> Observed {
    let mut observed = around();
    let job = first_attempt(&in_queue(json!({})), &observed);
    assert_eq!(job.labels()[labels::QUEUE], "research");
    assert_eq!(job.spec.as_ref().and_then(|spec| spec.suspend), Some(true));
    observe(&mut observed, &job, Attempt::NoPod, 0);
    if let (Some((is_evicted, message)), Some(uid)) = (says, observed.jobs[0].uid()) {
        let message = message.to_owned();
        observed.queue.insert(uid, QueueSays { is_evicted, message });
    }
    observed
}

#[test]
fn a_queued_attempt_is_kueues_to_start_and_its_words_are_quoted() {
    for (says, reason, words) in [
        (None, "Queued", "in queue research: Kueue has not seen it yet"),
        (
            Some((false, "Pending: no quota")),
            "Queued",
            "in queue research: Pending: no quota",
        ),
        (
            Some((true, "Preempted: for another")),
            "Preempted",
            "in queue research: Preempted: for another",
        ),
    ] {
        let observed = queued(says);
        let resource = in_queue(json!({}));
        let checked = resource.check(&observed, &env());
        assert_eq!(resource.plan(&checked, &observed, at(NOW)), Default::default());
        let outcome = resource.report(&checked, &observed, at(NOW));
        let ready = outcome.status.conditions.last().expect("Ready").clone();
        assert_eq!((ready.reason.as_str(), ready.message.as_str()), (reason, words));
        assert!(outcome.requeue.is_some(), "nothing tells when these words change");
    }
}

#[test]
fn who_suspends_a_queued_attempt_or_names_another_queue_takes_it_back() {
    let observed = queued(None);
    for (change, reason) in [
        (json!({"suspend": true}), "Suspended"),
        (json!({"scheduler": {"kubernetes": {"queue": "other"}}}), "Pending"),
        (json!({"scheduler": null}), "Pending"),
    ] {
        let mut resource = in_queue(change);
        let checked = resource.check(&observed, &env());
        let planned = resource.plan(&checked, &observed, at(NOW));
        assert_eq!(planned.delete.len(), 1, "{reason}");
        assert!(
            planned.suspend.is_empty() && planned.start.is_none(),
            "Kueue would resume it"
        );
        let status = resource.report(&checked, &observed, at(NOW)).status;
        assert_eq!(status.conditions.last().expect("Ready").reason, reason);
        // The Job is gone; when it may, the next attempt follows, and nothing was lost.
        resource.status = Some(status);
        let planned = resource.plan(&checked, &around(), at(NOW + 60));
        assert_eq!(planned.start.is_some(), reason != "Suspended");
        let status = resource.report(&checked, &around(), at(NOW + 60)).status;
        assert_eq!(status.run.map(|run| run.failures), Some(0));
    }
    // One that runs stays where it is: another queue is for the next attempt.
    let mut observed = around();
    let mut job = first_attempt(&in_queue(json!({})), &observed);
    job.spec.as_mut().expect("a spec").suspend = Some(false);
    observe(&mut observed, &job, Attempt::Running, 0);
    let resource = in_queue(json!({"scheduler": {"kubernetes": {"queue": "other"}}}));
    let checked = resource.check(&observed, &env());
    assert_eq!(resource.plan(&checked, &observed, at(NOW)), Default::default());
}

#[test]
fn a_jobset_is_read_as_the_job_that_it_stands_for() {
    let resource = in_queue(json!({}));
    let mut job = first_attempt(&resource, &around());
    jobset::mark(&mut job);
    let mut wrapped = jobset::wrap(&job);
    assert_eq!(wrapped.data["spec"]["suspend"], true);
    assert_eq!(wrapped.labels()[labels::QUEUE], "research");
    wrapped.metadata.uid = Some("uid-jobset".into());
    let view = jobset::view(&wrapped, &[]);
    assert!(jobset::is_jobset(&view));
    assert_eq!(
        view.spec.as_ref().map(|spec| (&spec.template, spec.suspend)),
        job.spec.as_ref().map(|spec| (&spec.template, Some(true)))
    );
    // How it ends is what its one Job says, with that Job's reason; without one, what it says itself.
    let mut observed = around();
    observe(&mut observed, &job, Attempt::Gone("DeadlineExceeded"), 5);
    let mut member = observed.jobs.remove(0);
    let owner = json!([{"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": "p", "uid": "uid-jobset"}]);
    member.metadata.owner_references = serde_json::from_value(owner).expect("an owner");
    let ended = jobset::view(&wrapped, &[member]);
    match state(&ended, &[], at(NOW)) {
        State::Failed(failure, _) => assert_eq!(failure.reason, Reason::DeadlineExceeded.name()),
        other => panic!("{other:?}"),
    }
    wrapped.data["status"] = json!({"conditions": [{"type": "Failed", "status": "True", "reason": "FailedJobs",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
    assert!(matches!(
        state(&jobset::view(&wrapped, &[]), &[], at(NOW)),
        State::Failed(..)
    ));
}

#[test]
fn of_several_nodes_node_0_publishes_and_the_one_that_failed_first_says_why() {
    let mut observed = around();
    let mut job = first_attempt(&pretrain("p", container(json!({}))), &observed);
    let spec = job.spec.as_mut().expect("a spec");
    (spec.completions, spec.parallelism) = (Some(2), Some(2));
    let pod_of = |observed: &mut Observed, node: usize, finished: &str| {
        let pod = observed.pods.last_mut().expect("a pod");
        pod.metadata.name = Some(format!("p-{node}"));
        let labels = pod.metadata.labels.get_or_insert_default();
        labels.insert("batch.kubernetes.io/job-completion-index".into(), node.to_string());
        let statuses = pod
            .status
            .as_mut()
            .and_then(|status| status.container_statuses.as_mut());
        let state = statuses.and_then(|all| all[0].state.as_mut());
        if let Some(end) = state.and_then(|state| state.terminated.as_mut()) {
            let time = finished.parse().expect("a time");
            end.finished_at = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(time));
        }
    };
    let lone = {
        let mut observed = observed.clone();
        observe(&mut observed, &job, Attempt::Running, 0);
        pod_of(&mut observed, 0, "");
        state(&observed.jobs[0], &observed.pods, at(NOW))
    };
    assert!(
        matches!(&lone, State::Waiting(Reason::Pending, words) if words.contains("1 of 2")),
        "{lone:?}"
    );

    // Node 1 fails; node 0 is stopped for it, a second later.
    observe(&mut observed, &job, Attempt::Ended(75, "Error", String::new()), 5);
    pod_of(&mut observed, 0, "2026-01-01T00:00:05Z");
    observe(
        &mut observed,
        &job,
        Attempt::Ended(70, "Error", "out of luck".into()),
        5,
    );
    pod_of(&mut observed, 1, "2026-01-01T00:00:04Z");
    match state(&observed.jobs[1], &observed.pods, at(NOW)) {
        State::Failed(failure, _) => assert!(failure.message.contains("out of luck"), "{failure:?}"),
        other => panic!("{other:?}"),
    }
    let mut observed = around();
    observe(&mut observed, &job, Attempt::Ended(0, "Completed", good_report('b')), 5);
    pod_of(&mut observed, 0, "2026-01-01T00:00:04Z");
    observe(
        &mut observed,
        &job,
        Attempt::Ended(0, "Completed", "node 1 of 2 is done".into()),
        5,
    );
    pod_of(&mut observed, 1, "2026-01-01T00:00:05Z");
    assert!(matches!(
        state(&observed.jobs[1], &observed.pods, at(NOW)),
        State::Published(_)
    ));
}

#[test]
fn long_names_stay_short_enough_for_the_pods_of_several_nodes_and_differ() {
    use crate::workload::job::name;
    let long = "a".repeat(48);
    let other = format!("{}b", "a".repeat(47));
    let id = "0123456789abcdef";
    assert_eq!(name(&long, id, 1, 1), format!("{long}-01234567-1"));
    for attempt in [1, 999] {
        let names = [name(&long, id, attempt, 2), name(&other, id, attempt, 2)];
        assert!(names.iter().all(|name| name.len() <= 47), "{names:?}");
        assert_ne!(names[0], names[1]);
    }
}
