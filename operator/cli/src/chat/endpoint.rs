//! The way to an endpoint that needs no address of it: a port-forward of the API server to a pod that is ready.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use serde_json::Value;
use strata_contract::SERVE_PORT;
use strata_operator::engine::kind::ResourceKind;
use strata_operator::workload::labels;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::events::Events;
use crate::cluster::{Connection, explain};

/// Longest silence of an endpoint: a long prompt on a slow machine is read before the first token.
const SILENCE: Duration = Duration::from_secs(300);
/// Most bytes of a refusal that are shown.
const REFUSAL_LIMIT_BYTES: usize = 64 << 10;

/// An InferenceService that can be asked.
pub struct Endpoint {
    connection: Connection,
    service: String,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

/// A stream to a pod, with or without TLS in it.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Endpoint {
    /// The endpoint of `service`.
    pub async fn of(connection: Connection, service: &str, authority: Option<&Path>) -> Result<Self> {
        let api: Api<strata_api::InferenceService> = Api::namespaced(connection.client.clone(), &connection.namespace);
        let read = api
            .get(service)
            .await
            .map_err(|error| explain(error, &format!("read InferenceService/{service}")))?;
        let tls = match read.spec.tls {
            None => None,
            Some(_) => Some((connector(authority)?, server_name(service, &connection.namespace)?)),
        };
        Ok(Self {
            connection,
            service: service.to_owned(),
            tls,
        })
    }

    /// Posts `body` and hands each piece of the streamed answer to `show`; returns it whole.
    pub async fn stream(&self, body: &Value, key: Option<&str>, show: impl Fn(&str) -> Result<()>) -> Result<String> {
        let stream = self.connect().await?;
        let (mut sender, driver) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // It ends with the connection; what went wrong shows in the answer.
        let driver = tokio::spawn(driver);
        let mut request = http::Request::post("/v1/chat/completions")
            .header("host", &self.service)
            .header("content-type", "application/json");
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let request = request.body(Full::new(Bytes::from(body.to_string())))?;
        let sent = within(sender.send_request(request)).await?;
        let response = sent.context("the pod closed the connection: `kubectl strata status` shows how it is")?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let mut said = Vec::new();
            while let Some(Ok(frame)) = within(body.frame()).await? {
                said.extend(frame.into_data().unwrap_or_default());
                if said.len() > REFUSAL_LIMIT_BYTES {
                    break;
                }
            }
            return Err(refusal(status.as_u16(), &said));
        }
        let (mut events, mut answer) = (Events::default(), String::new());
        while let Some(frame) = within(body.frame()).await? {
            let frame = frame.context("the connection broke in the middle of the answer")?;
            let text = events.read(&frame.into_data().unwrap_or_default())?;
            if !text.is_empty() {
                show(&text)?;
                answer.push_str(&text);
            }
        }
        driver.abort();
        if !events.ended() {
            bail!("the answer ended too early: the pod went away; ask again");
        }
        Ok(answer)
    }

    /// A new connection to a pod that is ready: the last one may be gone.
    async fn connect(&self) -> Result<Box<dyn Stream>> {
        let pods: Api<Pod> = Api::namespaced(self.connection.client.clone(), &self.connection.namespace);
        let selector: Vec<String> = labels::serving_selector(&self.service)
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let all = pods.list(&ListParams::default().labels(&selector.join(","))).await;
        let all = all.map_err(|error| explain(error, "list the pods"))?;
        let name = ResourceKind::InferenceService.name();
        let Some(pod) = all.items.iter().find(|pod| is_ready(pod)) else {
            bail!(
                "no pod of {name}/{0} is ready: `kubectl strata status {name}/{0}` says why",
                self.service
            );
        };
        let pod = pod.name_any();
        let mut forward = pods
            .portforward(&pod, &[SERVE_PORT])
            .await
            .map_err(|error| explain(error, &format!("reach pod {pod}")))?;
        let stream = forward
            .take_stream(SERVE_PORT)
            .context("the API server opened no stream")?;
        match &self.tls {
            None => Ok(Box::new(stream)),
            Some((connector, name)) => {
                let secured = connector.connect(name.clone(), stream).await;
                Ok(Box::new(secured.with_context(|| {
                    let name = name.to_str();
                    format!(
                        "the certificate of the endpoint is not trusted: give the authority that signed it for {name} with \
                         --certificate-authority FILE"
                    )
                })?))
            }
        }
    }
}

/// What the endpoint refused, in its own words where it has some.
fn refusal(status: u16, body: &[u8]) -> anyhow::Error {
    let said = serde_json::from_slice::<Value>(body).ok();
    let message = said.as_ref().and_then(|said| said["error"]["message"].as_str());
    let said = message.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned);
    let remedy = match status {
        401 | 403 => "; give a key in STRATA_API_KEY or with --api-key",
        429 | 503 => "; ask again in a moment",
        _ => "",
    };
    anyhow!("the endpoint said {status}: {}{remedy}", said.trim())
}

async fn within<T>(future: impl Future<Output = T>) -> Result<T> {
    let answered = tokio::time::timeout(SILENCE, future).await;
    answered.with_context(|| format!("the endpoint has said nothing for {} s", SILENCE.as_secs()))
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default();
    let ready = conditions
        .iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}

/// Its name inside of the cluster, for which certificates are made.
fn server_name(service: &str, namespace: &str) -> Result<ServerName<'static>> {
    ServerName::try_from(format!("{service}.{namespace}.svc")).context("no name for a certificate")
}

fn connector(authority: Option<&Path>) -> Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    // Debian's and Red Hat's bundles.
    let bundles = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"].map(Path::new);
    let given = authority.into_iter().collect::<Vec<_>>();
    let files = if given.is_empty() {
        bundles.into_iter().filter(|path| path.exists()).collect()
    } else {
        given
    };
    for file in files {
        let read = || format!("cannot read certificates from {}", file.display());
        let certificates = CertificateDer::pem_file_iter(file).with_context(read)?;
        for certificate in certificates {
            let certificate = certificate.with_context(read)?;
            match authority {
                Some(_) => roots.add(certificate).with_context(read)?,
                // Of a whole bundle, one that is not understood is no reason to trust none.
                None => drop(roots.add(certificate)),
            }
        }
    }
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_the_endpoint_said_and_what_to_do() {
        for (status, body, words) in [
            (
                401,
                "{\"error\":{\"message\":\"no such key\"}}",
                "said 401: no such key; give a key in STRATA_API_KEY",
            ),
            (503, "busy\n", "said 503: busy; ask again"),
            (400, "{}", "said 400: {}"),
        ] {
            let said = refusal(status, body.as_bytes()).to_string();
            assert!(said.contains(words), "{said}");
        }
    }

    #[test]
    fn a_file_without_certificates_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
        )
        .unwrap();
        let said = format!("{:#}", connector(Some(file.path())).err().unwrap());
        assert!(said.contains(&file.path().display().to_string()), "{said}");
    }
}
