//! Copies the shim so that it starts in any image, whatever C library that has, or none.
//!
//! The dynamic loader is a program that takes the folder of the libraries as an argument; so the loader, the libraries and
//! the shim are all it takes: `ld.so --library-path FOLDER FOLDER/strata-shim …`.

use std::ffi::{CStr, c_int, c_void};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use strata_contract::{EXIT_DONE, EXIT_RETRY, SHIM, SHIM_LOADER};

/// Copies; the exit status is the contract's.
pub fn run(folder: &Path) -> i32 {
    match copy(folder) {
        Ok(()) => EXIT_DONE,
        Err(error) => {
            tracing::error!("cannot copy the shim to {}: {error:#}", folder.display());
            EXIT_RETRY
        }
    }
}

fn copy(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let libraries = libraries();
    let is_loader = |path: &&PathBuf| name(path).starts_with("ld-");
    let Some(loader) = libraries.iter().find(is_loader) else {
        bail!("this build has no dynamic loader; build it for a target that has one");
    };
    put(loader, &folder.join(SHIM_LOADER))?;
    for library in libraries.iter().filter(|path| !is_loader(path)) {
        put(library, &folder.join(name(library)))?;
    }
    put(&std::env::current_exe()?, &folder.join(SHIM))
}

fn put(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("{} to {}", from.display(), to.display()))?;
    // The user of the other image may be another one.
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(0o755))?)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The libraries of this process under the names by which they were asked for, the loader among them.
fn libraries() -> Vec<PathBuf> {
    unsafe extern "C" fn each(info: *mut libc::dl_phdr_info, _: usize, found: *mut c_void) -> c_int {
        // SAFETY: `dl_iterate_phdr` hands over a valid description with a name that ends in 0, and the pointer that
        // `libraries` gave it, which is that of its own list.
        let (name, found) = unsafe { (CStr::from_ptr((*info).dlpi_name), &mut *found.cast::<Vec<PathBuf>>()) };
        let path = PathBuf::from(name.to_string_lossy().into_owned());
        // The program itself has no name, and the kernel's own library no path.
        if path.is_absolute() {
            found.push(path);
        }
        0
    }
    let mut found: Vec<PathBuf> = Vec::new();
    // SAFETY: `each` is called before this returns, only, and nothing else holds `found` meanwhile.
    unsafe { libc::dl_iterate_phdr(Some(each), (&raw mut found).cast()) };
    found
}
