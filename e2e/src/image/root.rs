//! The smallest root file system in which a program starts: its shared libraries, the loader, names and certificates.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::image::{Entry, Layer, USER};

const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Files that name resolution and TLS look for, and a `/tmp` for all.
///
/// # Errors
/// This machine has no CA bundle.
pub fn base() -> Result<Layer> {
    let certificates = fs::read(CERTIFICATES)
        .with_context(|| format!("cannot read {CERTIFICATES}; install the package ca-certificates"))?;
    let text = |text: String| Entry::Bytes(text.into_bytes(), 0o644);
    Ok(Layer::from([
        (
            "etc/passwd".to_owned(),
            text(format!(
                "root:x:0:0:root:/:/sbin/nologin\nstrata:x:{USER}:{USER}:strata:/:/sbin/nologin\n"
            )),
        ),
        ("etc/group".to_owned(), text(format!("root:x:0:\nstrata:x:{USER}:\n"))),
        ("etc/nsswitch.conf".to_owned(), text("hosts: files dns\n".to_owned())),
        (CERTIFICATES[1..].to_owned(), Entry::Bytes(certificates, 0o644)),
        ("tmp".to_owned(), Entry::Folder(0o1777)),
    ]))
}

/// The loader and the shared libraries of `program`, at the paths where the loader looks; empty for a static program.
///
/// # Errors
/// The program is missing, or needs a library that this machine lacks.
pub fn libraries(program: &Path) -> Result<Layer> {
    let run = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot run ldd (package libc-bin)")?;
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    if said.contains("not a dynamic executable") || said.contains("statically linked") {
        return Ok(Layer::new());
    }
    let mut layer = Layer::new();
    for path in needed(&said).with_context(|| format!("{} cannot start here", program.display()))? {
        add_library(&mut layer, Path::new(&path))?;
    }
    // Before glibc 2.34, name resolution loads these by name when it is first used.
    let beside = layer
        .keys()
        .find(|k| k.ends_with("/libc.so.6"))
        .map(|k| format!("/{k}"));
    for name in ["libnss_dns.so.2", "libnss_files.so.2", "libresolv.so.2"] {
        if let Some(path) = beside
            .as_ref()
            .map(|libc| Path::new(libc).with_file_name(name))
            .filter(|p| p.exists())
        {
            add_library(&mut layer, &path)?;
        }
    }
    Ok(layer)
}

fn add_library(layer: &mut Layer, path: &Path) -> Result<()> {
    let real = fs::canonicalize(path).with_context(|| format!("cannot read {}", path.display()))?;
    layer.insert(
        path.to_string_lossy().trim_start_matches('/').to_owned(),
        Entry::File(real, 0o755),
    );
    Ok(())
}

/// The paths in what `ldd` prints: `libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)`, `/lib64/ld-linux… (0x…)`.
fn needed(ldd: &str) -> Result<Vec<String>> {
    let mut paths = Vec::new();
    for line in ldd.lines() {
        let line = line.trim();
        if line.contains("not found") {
            anyhow::bail!("missing library: {line}");
        }
        let path = line.split_once(" => ").map_or(line, |(_, path)| path);
        if let Some(path) = path.split(" (").next().filter(|p| p.starts_with('/')) {
            paths.push(path.to_owned());
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_is_read_by_line() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            needed(ldd).unwrap(),
            ["/lib/x86_64-linux-gnu/libm.so.6", "/lib64/ld-linux-x86-64.so.2"]
        );
        let error = needed("\tlibcuda.so.1 => not found\n").unwrap_err().to_string();
        assert!(error.contains("libcuda.so.1"), "{error}");
    }

    #[test]
    fn a_program_gets_its_loader() {
        let layer = libraries(&std::env::current_exe().unwrap()).unwrap();
        assert!(layer.keys().any(|path| path.contains("ld-linux")), "{:?}", layer.keys());
        assert!(layer.keys().any(|path| path.ends_with("libc.so.6")));
    }
}
