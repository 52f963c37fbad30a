//! Which cluster and namespace a command talks to, with the flags and in the rights that kubectl has.

use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// The flags of kubectl that name a cluster.
#[derive(clap::Args, Clone, Debug)]
pub struct Cluster {
    /// Namespace; without, that of the context.
    #[arg(short, long, value_name = "NAME", help_heading = "Cluster")]
    pub namespace: Option<String>,
    /// Context of the kubeconfig; without, the current one.
    #[arg(long, value_name = "NAME", help_heading = "Cluster")]
    pub context: Option<String>,
    /// The kubeconfig; without, KUBECONFIG, ~/.kube/config, or the pod that this runs in.
    #[arg(long, value_name = "FILE", help_heading = "Cluster")]
    pub kubeconfig: Option<PathBuf>,
}

/// A client and the namespace that it works in.
#[derive(Clone)]
pub struct Connection {
    /// With the user's rights.
    pub client: Client,
    /// Where the resources are.
    pub namespace: String,
}

impl Cluster {
    /// Connects; nothing is sent yet.
    pub async fn connect(&self) -> Result<Connection> {
        let config = self.config().await?;
        let namespace = self
            .namespace
            .clone()
            .unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).context("the kubeconfig does not make a client")?;
        Ok(Connection { client, namespace })
    }

    async fn config(&self) -> Result<Config> {
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        let which = || match (&self.kubeconfig, &self.context) {
            (Some(path), _) => format!("cannot use the kubeconfig {}", path.display()),
            (None, Some(context)) => {
                format!("cannot use the context {context}: `kubectl config get-contexts` lists those there are")
            }
            (None, None) => "no cluster: set KUBECONFIG, or give --kubeconfig FILE".to_owned(),
        };
        if let Some(path) = &self.kubeconfig {
            let file = Kubeconfig::read_from(path).with_context(which)?;
            return Config::from_custom_kubeconfig(file, &options).await.with_context(which);
        }
        match Config::from_kubeconfig(&options).await {
            Ok(config) => Ok(config),
            Err(error) if self.context.is_none() => Config::incluster().map_err(|_| anyhow!(error)).with_context(which),
            Err(error) => Err(error).with_context(which),
        }
    }
}

/// What an error of the API server asks a user to do.
pub fn explain(error: kube::Error, what: &str) -> anyhow::Error {
    let remedy = match &error {
        // The server knows no such kind; of an object that is gone, it says which one.
        kube::Error::Api(status) if status.code == 404 && status.message.contains("page not found") => {
            "the cluster has no Strata, or one of another version: install charts/strata"
        }
        kube::Error::Api(status) if status.code == 404 => "it is gone: try again",
        kube::Error::Api(status) if status.code == 401 => "log in to the cluster again",
        kube::Error::Api(status) if status.code == 403 => {
            "ask the cluster's administrator for the role view in this namespace (edit, for chat), or choose another with \
             --namespace"
        }
        kube::Error::Service(_) | kube::Error::HyperError(_) => {
            "the API server does not answer: `kubectl cluster-info` asks the same one"
        }
        _ => return anyhow::Error::new(error).context(format!("cannot {what}")),
    };
    anyhow::Error::new(error).context(format!("cannot {what}: {remedy}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_server_says_what_to_do() {
        for (code, message, remedy) in [
            (404, "404 page not found", "install charts/strata"),
            (404, "pods \"chat-1\" not found", "it is gone: try again"),
            (403, "pods is forbidden", "role view"),
            (401, "Unauthorized", "log in"),
            (500, "boom", "cannot list the pods: "),
        ] {
            let status: kube::core::Status = serde_json::from_value(serde_json::json!({
                "status": "Failure", "code": code, "message": message, "reason": "x",
            }))
            .unwrap();
            let said = format!("{:#}", explain(kube::Error::Api(Box::new(status)), "list the pods"));
            assert!(said.contains(remedy) && said.contains(message), "{said}");
        }
    }
}
