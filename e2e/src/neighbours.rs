//! Other projects that Strata works with, as their own charts install them, with the programs compiled from their modules:
//! Kueue and JobSet. They are in no cluster but for a test that asks, and are gone after it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;

use crate::Context;
use crate::bed::Bed;
use crate::bed::command::{output, output_with_input};
use crate::bed::go::{self, Program};
use crate::image::catalog::Name;
use crate::namespace::tool;
use crate::wait;

/// How long one may take to start: the first probe of its chart comes late.
const STARTS: Duration = Duration::from_secs(120);

/// A project.
#[derive(Debug, Clone, Copy)]
pub struct Neighbour {
    program: Program,
    image: Name,
    /// The chart's folder in its module.
    chart: &'static str,
    /// Also the release's name, after which the chart names its objects.
    namespace: &'static str,
    /// The Deployment that is waited for.
    deployment: &'static str,
    /// The Secret with the certificate of its webhook.
    secret: &'static str,
    /// What the chart is told, beside the image.
    settings: &'static [&'static str],
}

/// Kueue: queues with quotas.
pub const KUEUE: Neighbour = Neighbour {
    program: Program::Kueue,
    image: Name::Kueue,
    chart: "charts/kueue",
    namespace: "kueue-system",
    deployment: "kueue-controller-manager",
    secret: "kueue-webhook-server-cert",
    settings: &[
        "controllerManager.manager.image.repository=strata.local/kueue",
        "controllerManager.manager.image.tag=0.15.0",
        "controllerManager.manager.image.pullPolicy=IfNotPresent",
        "controllerManager.manager.resources.requests.cpu=10m",
        "controllerManager.manager.resources.requests.memory=64Mi",
        "controllerManager.readinessProbe.initialDelaySeconds=1",
    ],
};

/// JobSet: Jobs that begin and end together.
pub const JOBSET: Neighbour = Neighbour {
    program: Program::Jobset,
    image: Name::Jobset,
    chart: "charts/jobset",
    namespace: "jobset-system",
    deployment: "jobset-controller",
    secret: "jobset-webhook-server-cert",
    settings: &[
        "image.repository=strata.local/jobset",
        "image.tag=0.11.0",
        "image.pullPolicy=IfNotPresent",
        "controller.resources.requests.cpu=10m",
        "controller.resources.requests.memory=64Mi",
    ],
};

impl Neighbour {
    /// Installs it, and waits until it answers.
    ///
    /// # Errors
    /// It was not compiled, or does not start.
    pub async fn install(&self, context: &Context) -> Result<()> {
        context.bed.import(&[self.image])?;
        let namespace = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {}}}\n",
            self.namespace
        );
        let apply = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        let manifests = format!("{namespace}---\n{}", self.manifests()?);
        output_with_input(context.bed.kubectl().args(apply), &manifests)?;
        // It makes its own certificates. A pod of before sees them when the kubelet next looks, in a minute or two; a new one
        // at once.
        let secrets: Api<Secret> = Api::namespaced(context.client.clone(), self.namespace);
        let has_certificate = |secret: Option<&Secret>| {
            let data = secret.and_then(|secret| secret.data.as_ref());
            data.is_some_and(|data| data.get("tls.crt").is_some_and(|file| !file.0.is_empty()))
        };
        wait::until(&secrets, self.secret, "holds a certificate", STARTS, has_certificate).await?;
        let pods = [
            "delete",
            "pods",
            "--all",
            "--grace-period=1",
            "--namespace",
            self.namespace,
        ];
        output(context.bed.kubectl().args(pods))?;
        let deployments: Api<Deployment> = Api::namespaced(context.client.clone(), self.namespace);
        let available = wait::deployment_is_available;
        wait::until(&deployments, self.deployment, "is available", STARTS, available).await?;
        Ok(())
    }

    /// Removes all of it. What is not there is no error.
    ///
    /// # Errors
    /// Something does not go.
    pub fn remove(&self, bed: &Bed) -> Result<()> {
        // Its rules first: they would ask a server that is gone.
        let kinds = "validatingwebhookconfigurations,mutatingwebhookconfigurations";
        let all = output(bed.kubectl().args(["get", kinds, "-o", "name"]))?;
        let name = self.program.name();
        for rule in all.lines().filter(|rule| rule.contains(name)) {
            output(bed.kubectl().args(["delete", rule, "--ignore-not-found"]))?;
        }
        let delete = ["delete", "--ignore-not-found", "--timeout=90s", "-f", "-"];
        output_with_input(bed.kubectl().args(delete), &self.manifests()?)?;
        output(
            bed.kubectl()
                .args(["delete", "namespace", self.namespace, "--ignore-not-found"]),
        )
        .map(drop)
    }

    /// What its chart makes.
    fn manifests(&self) -> Result<String> {
        let chart = go::source(self.program)?.join(self.chart);
        let mut helm = Command::new(tool(Program::Helm)?);
        helm.args(["template", self.program.name()]).arg(chart);
        helm.args(["--namespace", self.namespace, "--include-crds"]);
        for setting in self.settings {
            helm.args(["--set", setting]);
        }
        let all = output(&mut helm)?;
        // An API that the server has from elsewhere: while it is away, no namespace can be removed.
        let kept: Vec<&str> = all
            .split("\n---")
            .filter(|part| !part.contains("\nkind: APIService\n"))
            .collect();
        if kept.len() < 2 {
            bail!("the chart of {} makes nothing", self.program.name());
        }
        Ok(kept.join("\n---"))
    }
}
