//! The settings of every program of a bed, as text: pure, and the one place to look for a flag.
//!
//! Most of these were found by a failure; the comments say which.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use crate::bed::go::{self, Program as Go};
use crate::bed::pki::Pki;
use crate::bed::slot::{API_PORT, Slot};
use crate::bed::supervise::{Plan, Program};

/// Where containerd listens, inside the bed.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const ETCD: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 2379);
const ETCD_PEERS: &str = "http://127.0.0.1:2380";

/// Requests a second of a controller and of the scheduler. By default 20 and 50: what is measured beside them would be
/// measured against that limit.
const UNTHROTTLED: [(&str, &str); 2] = [("kube-api-qps", "1000"), ("kube-api-burst", "2000")];

/// Writes and nothing else, without the control plane's own: so that a test can count what one user wrote.
const AUDIT_POLICY: &str = "apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- { level: None, verbs: [get, list, watch] }
- level: None
  users: [\"system:apiserver\", \"system:kube-controller-manager\", \"system:kube-scheduler\", \"system:kube-proxy\"]
- { level: None, userGroups: [\"system:nodes\", \"system:serviceaccounts:kube-system\"] }
- { level: Metadata }
";

/// The audit log of the bed whose files are in `state`.
#[must_use]
pub fn audit_log(state: &Path) -> PathBuf {
    state.join("log/audit.json")
}

/// The files to write under the state folder: relative path and text.
#[must_use]
pub fn files(slot: Slot, state: &Path, snapshotter: &str) -> Vec<(&'static str, String)> {
    vec![
        ("audit-policy.yaml", AUDIT_POLICY.to_owned()),
        ("cni/10-pods.conflist", cni(slot)),
        ("containerd.toml", containerd(state, snapshotter)),
        ("kubelet.yaml", kubelet(slot, &Pki::at(state))),
    ]
}

/// What the bed's first process does.
#[must_use]
pub fn plan(slot: Slot, state: &Path) -> Plan {
    let pki = Pki::at(state);
    let file = |name: &str| state.join(name).to_string_lossy().into_owned();
    let api = Some(SocketAddr::from((slot.node_address(), API_PORT)));
    let node_address = slot.node_address().to_string();
    let program = |name: &str, path: String, after, arguments: Vec<String>| {
        let mut command = vec![path];
        command.extend(arguments);
        Program {
            name: name.to_owned(),
            command,
            after,
        }
    };
    let go = |program: Go| go::path(program).to_string_lossy().into_owned();
    let flags = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| format!("--{k}={v}")).collect::<Vec<_>>();

    let etcd = flags(&[
        ("data-dir", &file("etcd")),
        ("listen-client-urls", &format!("http://{ETCD}")),
        ("advertise-client-urls", &format!("http://{ETCD}")),
        ("listen-peer-urls", ETCD_PEERS),
        ("initial-advertise-peer-urls", ETCD_PEERS),
        ("initial-cluster", &format!("default={ETCD_PEERS}")),
        // Nothing here outlives the bed, so no write needs to wait for the disk.
        ("unsafe-no-fsync", "true"),
        ("log-level", "warn"),
    ]);
    // Memory for speed, within bounds: with Go's default a third of its work is collecting garbage, which every test waits for.
    let mut apiserver = vec!["GOGC=400".into(), "GOMEMLIMIT=6GiB".into(), go(Go::KubeApiserver)];
    apiserver.extend(flags(&[
        ("etcd-servers", &format!("http://{ETCD}")),
        ("bind-address", &node_address),
        ("advertise-address", &node_address),
        ("secure-port", &API_PORT.to_string()),
        ("client-ca-file", &pki.file("ca.crt")),
        ("tls-cert-file", &pki.file("apiserver.crt")),
        ("tls-private-key-file", &pki.file("apiserver.key")),
        ("service-account-issuer", "https://kubernetes.default.svc.cluster.local"),
        ("service-account-key-file", &pki.file("tokens.pub")),
        ("service-account-signing-key-file", &pki.file("tokens.key")),
        ("service-cluster-ip-range", &slot.service_range()),
        ("authorization-mode", "Node,RBAC"),
        ("kubelet-certificate-authority", &pki.file("ca.crt")),
        ("kubelet-client-certificate", &pki.file("kubelet-client.crt")),
        ("kubelet-client-key", &pki.file("kubelet-client.key")),
        ("kubelet-preferred-address-types", "InternalIP"),
        ("audit-policy-file", &file("audit-policy.yaml")),
        ("audit-log-path", &audit_log(state).to_string_lossy()),
        ("audit-log-maxsize", "4000"),
        ("audit-log-maxbackup", "1"),
        ("profiling", "false"),
    ]));
    let controller_manager = flags(&[
        ("kubeconfig", &pki.kubeconfig("controller-manager")),
        ("bind-address", "127.0.0.1"),
        ("service-account-private-key-file", &pki.file("tokens.key")),
        ("root-ca-file", &pki.file("ca.crt")),
        ("use-service-account-credentials", "true"),
        ("leader-elect", "false"),
        ("profiling", "false"),
        // The one node is watched by the bed, and nodes that kwok plays say nothing of themselves.
        ("node-monitor-grace-period", "24h"),
        // A benchmark ends more pods than a cluster keeps by default.
        ("terminated-pod-gc-threshold", "0"),
        UNTHROTTLED[0],
        UNTHROTTLED[1],
    ]);
    let scheduler = flags(&[
        ("kubeconfig", &pki.kubeconfig("scheduler")),
        ("bind-address", "127.0.0.1"),
        UNTHROTTLED[0],
        UNTHROTTLED[1],
        ("leader-elect", "false"),
        ("profiling", "false"),
    ]);
    let kubelet = flags(&[
        ("config", &file("kubelet.yaml")),
        ("kubeconfig", &pki.kubeconfig("node")),
        ("hostname-override", &slot.name()),
        // Without it: no node address, so no logs and no exec.
        ("node-ip", &node_address),
    ]);
    let proxy = flags(&[
        ("kubeconfig", &pki.kubeconfig("proxy")),
        ("proxy-mode", "iptables"),
        ("cluster-cidr", &slot.pod_range()),
        ("hostname-override", &slot.name()),
        // Zero leaves these sysctls alone: they cannot be written on every machine.
        ("conntrack-max-per-core", "0"),
        ("conntrack-tcp-timeout-established", "0s"),
        ("conntrack-tcp-timeout-close-wait", "0s"),
    ]);

    Plan {
        logs: state.join("log"),
        scratch: vec!["/run".into(), "/var/lib/cni".into()],
        binds: vec![
            (state.join("kubelet"), "/var/lib/kubelet".into()),
            (state.join("log/pods"), "/var/log/pods".into()),
            (state.join("log/containers"), "/var/log/containers".into()),
        ],
        address: slot.node_address(),
        programs: vec![
            program("etcd", go(Go::Etcd), None, etcd),
            program(
                "containerd",
                "containerd".into(),
                None,
                vec!["--config".into(), file("containerd.toml")],
            ),
            program("kube-apiserver", "/usr/bin/env".into(), Some(ETCD), apiserver),
            program(
                "kube-controller-manager",
                go(Go::KubeControllerManager),
                api,
                controller_manager,
            ),
            program("kube-scheduler", go(Go::KubeScheduler), api, scheduler),
            program("kubelet", go(Go::Kubelet), api, kubelet),
            program("kube-proxy", go(Go::KubeProxy), api, proxy),
        ],
    }
}

fn cni(slot: Slot) -> String {
    let pods = slot.pod_range();
    // Not the bridge plugin: what goes over a bridge passes iptables only where the module br_netfilter is loaded, and a
    // pod would not reach a Service whose pod is its neighbour. Between point-to-point links the kernel routes.
    format!(
        r#"{{"cniVersion": "0.4.0", "name": "strata", "plugins": [
  {{"type": "ptp",
    "ipam": {{"type": "host-local", "ranges": [[{{"subnet": "{pods}"}}]], "routes": [{{"dst": "0.0.0.0/0"}}]}}}},
  {{"type": "portmap", "capabilities": {{"portMappings": true}}}}
]}}
"#
    )
}

fn containerd(state: &Path, snapshotter: &str) -> String {
    // restrict_oom_score_adj: runc may not set the pause container's -998 without CAP_SYS_RESOURCE.
    // sandbox_image: no registry is in reach.
    format!(
        r#"version = 2
root = "{root}"
state = "/run/containerd"
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
"#,
        root = state.join("containerd").display(),
        cni = state.join("cni").display(),
        pause = crate::image::catalog::PAUSE,
    )
}

fn kubelet(slot: Slot, pki: &Pki) -> String {
    // failCgroupV1: version 1 is refused by default since 1.35. cgroupRoot: two kubelets under one root would each
    // remove the other's pods. imageGCHighThresholdPercent 100: an image that is collected cannot be pulled again.
    format!(
        r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
failSwapOn: false
cgroupDriver: cgroupfs
cgroupRoot: /{name}
containerRuntimeEndpoint: unix://{CONTAINERD_SOCKET}
authentication: {{ anonymous: {{ enabled: false }}, webhook: {{ enabled: true }}, x509: {{ clientCAFile: "{ca}" }} }}
authorization: {{ mode: Webhook }}
tlsCertFile: "{cert}"
tlsPrivateKeyFile: "{key}"
address: {address}
healthzPort: 0
resolvConf: ""
clusterDomain: cluster.local
clusterDNS: [{dns}]
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {{ memory.available: 100Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1% }}
"#,
        name = slot.name(),
        ca = pki.file("ca.crt"),
        cert = pki.file("kubelet.crt"),
        key = pki.file("kubelet.key"),
        address = slot.node_address(),
        dns = slot.dns_address(),
    )
}
