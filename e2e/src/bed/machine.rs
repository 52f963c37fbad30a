//! What the machine itself must have: root, and Debian packages, installed when something of them is missing.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::bed::cache;
use crate::bed::command::{self, say};

/// A Debian package, known by a program that it brings.
#[derive(Debug, Clone, Copy)]
pub struct Package {
    /// Its name.
    pub name: &'static str,
    /// A program of it, by name or by path.
    pub program: &'static str,
}

impl Package {
    const fn new(name: &'static str, program: &'static str) -> Self {
        Self { name, program }
    }
}

/// How long after a failed `apt-get update` comes the second and last.
const UPDATE_PAUSE: Duration = Duration::from_secs(20);

/// A shell in one file.
pub const BUSYBOX: Package = Package::new("busybox-static", "busybox");
/// For one wheel.
pub const PYTHON: Package = Package::new("python3", "python3");

/// What Argo CD reads repositories with.
pub const GIT: Package = Package::new("git", "git");
/// What Argo CD keeps its cache in. The package redis-server would start one as a service; it is a link to this program, which
/// is a server where it is called `redis-server`.
pub const REDIS: Package = Package::new("redis-tools", "redis-check-rdb");

/// What a bed runs or calls.
pub const BED: [Package; 9] = [
    Package::new("containerd", "containerd"),
    Package::new("runc", "runc"),
    Package::new("containernetworking-plugins", "/usr/lib/cni/ptp"),
    Package::new("iptables", "iptables"),
    Package::new("conntrack", "conntrack"),
    Package::new("ethtool", "ethtool"),
    Package::new("iproute2", "ip"),
    Package::new("util-linux", "unshare"),
    Package::new("ca-certificates", "/etc/ssl/certs/ca-certificates.crt"),
];

/// Checks what cannot be installed.
///
/// # Errors
/// Not root.
pub fn check() -> Result<()> {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        bail!("the bed runs containers and needs root: run it as root or with sudo -E");
    }
    Ok(())
}

/// Installs those of `packages` whose program is missing; asks nobody when none is.
///
/// # Errors
/// `apt-get` is missing or fails.
pub fn install(packages: &[Package]) -> Result<()> {
    let _alone = cache::lock("packages")?;
    let missing: Vec<&str> = packages
        .iter()
        .filter(|p| find(p.program).is_none())
        .map(|p| p.name)
        .collect();
    if missing.is_empty() { Ok(()) } else { apt(&missing) }
}

/// Installs a package that is not known by a program.
///
/// # Errors
/// As [`install`].
pub fn install_package(name: &'static str) -> Result<()> {
    apt(&[name])
}

fn apt(names: &[&str]) -> Result<()> {
    say(format_args!(
        "installing the Debian packages {} (about a minute)",
        names.join(" ")
    ));
    if find("apt-get").is_none() {
        bail!("this machine has no apt-get: install {} yourself", names.join(", "));
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        // A machine that has just started often upgrades itself: wait for that.
        command.args(["-qq", "-o", "DPkg::Lock::Timeout=300"]);
        command
    };
    // The lock of the lists knows no time-out, and mirrors are out of step for moments.
    if command::output(apt().arg("update")).is_err() {
        std::thread::sleep(UPDATE_PAUSE);
        command::output(apt().arg("update"))?;
    }
    command::output(apt().args(["install", "--yes", "--no-install-recommends"]).args(names))?;
    Ok(())
}

/// Where `program` lies; also in the folders that are on root's PATH only.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}
