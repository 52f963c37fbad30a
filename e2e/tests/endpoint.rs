//! An endpoint as its users meet it: over HTTPS, with keys, with an adapter beside the model, and with a disk behind the cache.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use kube::ResourceExt as _;
use kube::api::{ListParams, Patch, PatchParams};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use reqwest::Certificate;
use serde_json::{Value, json};
use strata_api::InferenceService;
use strata_e2e::bed::network::http_builder;
use strata_e2e::strata::{apply, condition, ready};
use strata_e2e::{Context, install, operator, run, wait, with_temp_ns};

const DEADLINE: Duration = Duration::from_secs(300);

const SERVICE: &str = "apiVersion: strata.dev/v1alpha1
kind: InferenceService
metadata: {name: plain}
spec:
  storage: {uri: 'pvc://artifacts'}
  model: {pretrainJob: {name: base}}
  kvCache: {memory: 1Mi, spill: {size: 4Mi}}
  adapters: [{name: shout, uri: 'pvc://raw/adapters/shout'}]
  speculation: {ngram: {}}
  maxConcurrentRequests: 4
  auth: {secret: {name: keys, key: keys}}
  tls: {secretName: certificate}
  autoscale: {maxReplicas: 2, targets: {kvCacheUtilizationPercent: 90}}
";

#[tokio::test]
async fn who_has_a_key_is_answered_over_https_by_model_adapter_and_disk_and_a_new_key_counts_without_a_restart() {
    with_temp_ns(|context| async move {
        install::once(&context.bed)?;
        let raw = context.claim("raw", "1Gi", None).await?.path()?;
        context.claim("artifacts", "1Gi", None).await?;
        fs::write(raw.join("words.txt"), run::text())?;
        apply(&context, run::WORDS).await?;
        apply(&context, &run::pretrain("base", 2048)).await?;
        write_adapter(&raw.join("adapters/shout"))?;
        let host = format!("plain.{}.svc", context.namespace);
        let authority = certify(&context, &host).await?;
        secret(&context, "keys", "Opaque", json!({"keys": "old\n"})).await?;
        apply(&context, SERVICE).await?;

        // Ready: the probes pass, over HTTPS and without a key.
        let service: InferenceService = ready(&context, "plain", DEADLINE).await?;
        let url = service.status.and_then(|status| status.url).context("an address")?;
        ensure!(url == format!("https://{host}"), "{url}");
        let is_asked = |service: Option<&InferenceService>| {
            service
                .and_then(|service| condition(service, "MetricsAvailable"))
                .is_some_and(|(status, ..)| status == "True")
        };
        let what = "is asked for its metrics, over HTTPS and without a key";
        wait::until(&context.api(), "plain", what, DEADLINE, is_asked).await?;
        let address = address(&context).await?;
        let client = client(&authority, &host, address)?;
        let status = async |key: Option<&str>| -> Result<u16> {
            let request = client.get(format!("{url}/v1/models"));
            let request = match key {
                Some(key) => request.bearer_auth(key),
                None => request,
            };
            Ok(request.send().await?.status().as_u16())
        };
        ensure!(status(None).await? == 401, "nobody is answered without a key");
        ensure!(status(Some("new")).await? == 401, "nor with another one");
        ensure!(status(Some("old")).await? == 200, "but with the key");
        let stranger = self::client(&self_signed()?.0, &host, address)?;
        let seen = stranger.get(format!("{url}/health")).send().await;
        ensure!(seen.is_err(), "who trusts another authority does not connect");

        let said = async |model: &str| -> Result<Value> {
            let body =
                json!({"model": model, "prompt": "The 7. word", "max_tokens": 4, "temperature": 0, "logprobs": 0});
            let request = client
                .post(format!("{url}/v1/completions"))
                .bearer_auth("old")
                .json(&body);
            let answer: Value = request.send().await?.error_for_status()?.json().await?;
            ensure!(answer["model"] == model, "{answer}");
            Ok(answer["choices"][0]["logprobs"]["token_logprobs"].clone())
        };
        let (plain, shout) = (said("plain").await?, said("shout").await?);
        ensure!(plain != shout, "the adapter changes what is said: {plain}");

        // 1Mi is 512 blocks of 16 tokens: what the others fill, the first prompt has left for the disk.
        let complete = async |prompts: Vec<Value>| -> Result<Value> {
            let body = json!({"model": "plain", "prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 0});
            let request = client
                .post(format!("{url}/v1/completions"))
                .bearer_auth("old")
                .json(&body);
            let answer: Value = request.send().await?.error_for_status()?.json().await?;
            Ok(answer["choices"][0]["logprobs"]["token_logprobs"].clone())
        };
        let prompt = |number: usize| {
            json!(
                [number % 200, number / 200]
                    .into_iter()
                    .chain(2..24)
                    .collect::<Vec<_>>()
            )
        };
        let figure = async |name: &str| -> Result<f64> {
            let page = client
                .get(format!("{url}/metrics"))
                .send()
                .await?
                .error_for_status()?
                .text()
                .await?;
            operator::series(&page, name)
                .next()
                .with_context(|| format!("no {name}"))
        };
        let computed = complete(vec![prompt(0)]).await?;
        for first in (1..1200).step_by(8) {
            complete((first..first + 8).map(prompt).collect()).await?;
        }
        let used_bytes = figure("strata_kv_spill_used_bytes").await?;
        ensure!((1.0..=4.0 * 1024.0 * 1024.0).contains(&used_bytes), "{used_bytes}");
        let before = figure("vllm:external_prefix_cache_hits_total").await?;
        ensure!(
            complete(vec![prompt(0)]).await? == computed,
            "read from the disk, it is what was computed"
        );
        let read = figure("vllm:external_prefix_cache_hits_total").await? - before;
        ensure!(read == 16.0, "{read} tokens were read from the disk");

        let pods = async || -> Result<Vec<Pod>> {
            let labels = ListParams::default().labels("strata.dev/name=plain,app.kubernetes.io/component=serve");
            Ok(context.api::<Pod>().list(&labels).await?.items)
        };
        let before = pods().await?.pop().context("a pod")?;
        secret(&context, "keys", "Opaque", json!({"keys": "new\n"})).await?;
        // The kubelet writes a Secret anew when it next looks at the pod: a change of the pod makes it look now.
        let touch = json!({"metadata": {"annotations": {"look": "now"}}});
        let (name, params) = (before.name_any(), PatchParams::default());
        context
            .api::<Pod>()
            .patch(&name, &params, &Patch::Merge(&touch))
            .await?;
        wait::poll("the new key counts", DEADLINE, || async {
            Ok((status(Some("new")).await? == 200).then_some(()))
        })
        .await?;
        ensure!(status(Some("old")).await? == 401, "the old key has ended");
        let after = pods().await?;
        let restarts = |pod: &Pod| -> i32 {
            let status = pod
                .status
                .as_ref()
                .and_then(|status| status.container_statuses.as_ref());
            status
                .into_iter()
                .flatten()
                .map(|container| container.restart_count)
                .sum()
        };
        ensure!(
            after.len() == 1 && after[0].uid() == before.uid() && restarts(&after[0]) == 0,
            "the same pod, never started again: {after:?}"
        );
        Ok(())
    })
    .await;
}

/// A folder as PEFT writes it, for the model of [`run::pretrain`]: it moves the values of its one layer, by a lot.
fn write_adapter(folder: &Path) -> Result<()> {
    const WIDTH: usize = 32;
    const RANK: usize = 2;
    let config = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["v_proj"]});
    let name = |part: &str| format!("base_model.model.model.layers.0.self_attn.v_proj.lora_{part}.weight");
    let bytes = RANK * WIDTH * 4;
    let header = json!({
        name("A"): {"dtype": "F32", "shape": [RANK, WIDTH], "data_offsets": [0, bytes]},
        name("B"): {"dtype": "F32", "shape": [WIDTH, RANK], "data_offsets": [bytes, 2 * bytes]},
    })
    .to_string();
    let values = (0..2 * RANK * WIDTH).map(|i| (i * 7 % 11) as f32 / 5.0 - 1.0);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(values.flat_map(f32::to_le_bytes));
    fs::create_dir_all(folder)?;
    fs::write(folder.join("adapter_config.json"), config.to_string())?;
    fs::write(folder.join("adapter_model.safetensors"), file)?;
    Ok(())
}

/// A new authority: its certificate, and what signs with it.
fn self_signed() -> Result<(Certificate, Issuer<'static, KeyPair>)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = Certificate::from_pem(params.self_signed(&key)?.pem().as_bytes())?;
    Ok((certificate, Issuer::new(params, key)))
}

/// Makes the Secret `certificate` for `host`, as cert-manager does; who signed it.
async fn certify(context: &Context, host: &str) -> Result<Certificate> {
    let (authority, issuer) = self_signed()?;
    let key = KeyPair::generate()?;
    let leaf = CertificateParams::new(vec![host.to_owned()])?.signed_by(&key, &issuer)?;
    let files = json!({"tls.crt": leaf.pem(), "tls.key": key.serialize_pem()});
    secret(context, "certificate", "kubernetes.io/tls", files).await?;
    Ok(authority)
}

async fn secret(context: &Context, name: &str, kind: &str, files: Value) -> Result<()> {
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": kind, "stringData": files,
    });
    let params = PatchParams::apply("e2e").force();
    context
        .api::<Secret>()
        .patch(name, &params, &Patch::Apply(&secret))
        .await?;
    Ok(())
}

/// Where the Service is.
async fn address(context: &Context) -> Result<SocketAddr> {
    let service = context.api::<Service>().get("plain").await?.spec.context("a spec")?;
    let ports = service.ports.unwrap_or_default();
    ensure!(ports.iter().map(|port| port.port).eq([443]), "{ports:?}");
    Ok(SocketAddr::new(service.cluster_ip.context("an address")?.parse()?, 443))
}

/// A client that trusts `authority` alone and finds `host` at `address`.
fn client(authority: &Certificate, host: &str, address: SocketAddr) -> Result<reqwest::Client> {
    let client = http_builder()
        .tls_certs_only([authority.clone()])
        .resolve(host, address);
    Ok(client.build()?)
}
