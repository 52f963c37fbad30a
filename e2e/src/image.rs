//! OCI image layouts without Docker: a program and what it needs to start, as one tar that containerd imports and
//! that `crane` pushes. The same input gives the same digest.

pub mod catalog;
pub mod root;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The user and group that all images run as.
pub const USER: u32 = 65532;
/// Digits of the digest that make a tag: no two builds of a machine meet in them.
const TAG_LENGTH: usize = 12;
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// What stands at one path of a layer.
#[derive(Debug, Clone)]
pub enum Entry {
    /// An empty folder with this mode.
    Folder(u32),
    /// A file with these bytes and mode.
    Bytes(Vec<u8>, u32),
    /// A copy of a file of this machine, with this mode.
    File(PathBuf, u32),
    /// A symbolic link to this path.
    Link(String),
}

/// Paths without a leading slash, in the order of the tar. Parents are added where they are missing.
pub type Layer = BTreeMap<String, Entry>;

/// An image to be written.
#[derive(Debug, Clone)]
pub struct Image {
    /// The name that a pod uses, `strata.local/NAME:TAG`. Without a tag it gets one from its digest, so that another
    /// content has another name.
    pub reference: String,
    /// From the bottom up: what changes least comes first, and images share equal layers.
    pub layers: Vec<Layer>,
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
}

/// An image that lies in a file.
#[derive(Debug, Clone)]
pub struct Built {
    /// The name that a pod uses.
    pub reference: String,
    /// The tar of the OCI layout.
    pub tar: PathBuf,
    /// `sha256:…` of the manifest: the image's identity.
    pub digest: String,
}

struct Blob {
    digest: String,
    size: u64,
    content: Content,
}

enum Content {
    Bytes(Vec<u8>),
    File(File),
}

impl Image {
    /// Writes the image into `folder` as `NAME.tar`.
    ///
    /// # Errors
    /// A file of a layer cannot be read, or the tar cannot be written.
    pub fn write(&self, folder: &Path) -> Result<Built> {
        fs::create_dir_all(folder)?;
        let mut layers = Vec::new();
        for layer in &self.layers {
            layers.push(layer_blob(layer, folder).with_context(|| format!("cannot write {}", self.reference))?);
        }
        let ids: Vec<&str> = layers.iter().map(|l| l.digest.as_str()).collect();
        let config = Blob::json(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "User": format!("{USER}:{USER}"),
                "Entrypoint": self.entrypoint,
                "WorkingDir": "/",
                "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"],
            },
            "rootfs": { "type": "layers", "diff_ids": ids },
        }))?;
        let manifest = Blob::json(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor(CONFIG),
            "layers": layers.iter().map(|l| l.descriptor(LAYER)).collect::<Vec<_>>(),
        }))?;
        let digest = manifest.digest.clone();
        let mut described = manifest.descriptor(MANIFEST);
        let reference = match self.reference.contains(':') {
            true => self.reference.clone(),
            false => format!("{}:{}", self.reference, &digest["sha256:".len()..][..TAG_LENGTH]),
        };
        described["annotations"] = json!({
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": split(&reference).1,
        });
        let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": [described] }))?;

        let name = self.reference.rsplit('/').next().unwrap_or_default().replace(':', "-");
        let tar = folder.join(format!("{name}.tar"));
        let mut out = tar::Builder::new(BufWriter::new(tempfile::NamedTempFile::new_in(folder)?));
        append(&mut out, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        append(&mut out, "index.json", 0o644, &index)?;
        let mut blobs: BTreeMap<String, Blob> = BTreeMap::new();
        for blob in layers.into_iter().chain([config, manifest]) {
            blobs.insert(blob.digest.clone(), blob);
        }
        for (digest, blob) in blobs {
            let path = format!("blobs/sha256/{}", digest.trim_start_matches("sha256:"));
            match blob.content {
                Content::Bytes(bytes) => append(&mut out, &path, 0o644, &bytes)?,
                Content::File(mut file) => {
                    file.seek(SeekFrom::Start(0))?;
                    out.append_data(&mut header(tar::EntryType::Regular, 0o644, blob.size), &path, file)?;
                }
            }
        }
        let file = out.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.persist(&tar)?;
        Ok(Built { reference, tar, digest })
    }
}

impl Built {
    /// `NAME` of `…/NAME:TAG`.
    #[must_use]
    pub fn name(&self) -> &str {
        let repository = split(&self.reference).0;
        repository.rsplit('/').next().unwrap_or(repository)
    }

    /// The image under another host and path.
    #[must_use]
    pub fn at(&self, registry: &str) -> Self {
        let reference = format!("{}/{}:{}", registry.trim_end_matches('/'), self.name(), self.tag());
        Self {
            reference,
            ..self.clone()
        }
    }

    /// `TAG` of `…/NAME:TAG`.
    #[must_use]
    pub fn tag(&self) -> &str {
        split(&self.reference).1
    }

    /// `…/NAME` of `…/NAME:TAG`.
    #[must_use]
    pub fn repository(&self) -> &str {
        split(&self.reference).0
    }
}

/// Repository and tag; the host may have a port.
fn split(reference: &str) -> (&str, &str) {
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (reference, "latest"),
    }
}

impl Blob {
    fn json(value: &Value) -> Result<Self> {
        let bytes = serde_json::to_vec(value)?;
        let digest = format!("sha256:{:x}", Sha256::digest(&bytes));
        Ok(Self {
            digest,
            size: bytes.len() as u64,
            content: Content::Bytes(bytes),
        })
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({ "mediaType": media_type, "digest": self.digest, "size": self.size })
    }
}

/// A file that is hashed while it is written.
struct Hashing {
    file: File,
    hash: Sha256,
    size: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn layer_blob(layer: &Layer, folder: &Path) -> Result<Blob> {
    let hashing = Hashing {
        file: tempfile::tempfile_in(folder)?,
        hash: Sha256::new(),
        size: 0,
    };
    let mut out = tar::Builder::new(BufWriter::with_capacity(1 << 20, hashing));
    for (path, entry) in with_parents(layer) {
        match entry {
            Entry::Folder(mode) => {
                let mut header = header(tar::EntryType::Directory, mode, 0);
                out.append_data(&mut header, format!("{path}/"), io::empty())?;
            }
            Entry::Bytes(bytes, mode) => append(&mut out, &path, mode, &bytes)?,
            Entry::File(source, mode) => {
                let read = || -> Result<(File, u64)> {
                    let file = File::open(&source)?;
                    let size = file.metadata()?.len();
                    Ok((file, size))
                };
                let (file, size) = read().with_context(|| format!("cannot read {}", source.display()))?;
                out.append_data(&mut header(tar::EntryType::Regular, mode, size), &path, file.take(size))?;
            }
            Entry::Link(target) => {
                out.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), &path, target)?;
            }
        }
    }
    let hashing = out.into_inner()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    let digest = format!("sha256:{:x}", hashing.hash.finalize());
    Ok(Blob {
        digest,
        size: hashing.size,
        content: Content::File(hashing.file),
    })
}

/// The entries and the folders above them, parents first (which is also the order of their names).
fn with_parents(layer: &Layer) -> Layer {
    let mut all = layer.clone();
    for path in layer.keys() {
        for parent in Path::new(path).ancestors().skip(1) {
            let parent = parent.to_string_lossy().into_owned();
            if !parent.is_empty() {
                all.entry(parent).or_insert(Entry::Folder(0o755));
            }
        }
    }
    all
}

fn append<W: Write>(out: &mut tar::Builder<W>, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
    Ok(out.append_data(
        &mut header(tar::EntryType::Regular, mode, bytes.len() as u64),
        path,
        bytes,
    )?)
}

/// Root's, and from the first second of 1970: nothing of this machine or hour may change the digest.
fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// The architecture by Go's name, which OCI uses.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(layers: Vec<Layer>) -> Image {
        Image {
            reference: "strata.local/x:1".into(),
            layers,
            entrypoint: vec!["/usr/bin/x".into()],
        }
    }

    #[test]
    fn the_same_input_gives_the_same_digest_and_every_blob_is_named_by_its_hash() {
        let source = tempfile::tempdir().unwrap();
        fs::write(source.path().join("x"), vec![7; 100_000]).unwrap();
        let layer = Layer::from([
            ("usr/bin/x".to_owned(), Entry::File(source.path().join("x"), 0o755)),
            (
                "etc/hosts".to_owned(),
                Entry::Bytes(b"127.0.0.1 localhost\n".to_vec(), 0o644),
            ),
            ("lib".to_owned(), Entry::Link("usr/lib".into())),
        ]);
        let folder = tempfile::tempdir().unwrap();
        let first = image(vec![layer.clone()]).write(folder.path()).unwrap();
        let bytes = fs::read(&first.tar).unwrap();
        let second = image(vec![layer]).write(folder.path()).unwrap();
        assert_eq!(first.digest, second.digest);
        assert_eq!(bytes, fs::read(&second.tar).unwrap());
        let mut blobs = 0;
        for entry in tar::Archive::new(bytes.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            if let Some(hash) = path.strip_prefix("blobs/sha256/") {
                assert_eq!(hash, format!("{:x}", Sha256::digest(&content)));
                blobs += 1;
            }
        }
        assert_eq!(blobs, 3, "configuration, manifest, one layer");
        let other = image(vec![Layer::from([(
            "usr/bin/x".to_owned(),
            Entry::Bytes(vec![8], 0o755),
        )])]);
        assert_ne!(first.digest, other.write(folder.path()).unwrap().digest);
    }

    #[test]
    fn an_image_without_a_tag_is_named_by_its_digest() {
        let folder = tempfile::tempdir().unwrap();
        let image = Image {
            reference: "strata.local/x".into(),
            ..image(vec![Layer::new()])
        };
        let built = image.write(folder.path()).unwrap();
        assert_eq!(built.tag(), &built.digest[7..19]);
        let there = built.at("registry.example.org:5000/team/");
        let expected = format!("registry.example.org:5000/team/x:{}", built.tag());
        assert_eq!((there.reference.as_str(), there.name()), (expected.as_str(), "x"));
    }

    #[test]
    fn folders_come_before_what_is_in_them() {
        let layer = Layer::from([("usr/lib/x/y".to_owned(), Entry::Bytes(Vec::new(), 0o644))]);
        let paths: Vec<String> = with_parents(&layer).into_keys().collect();
        assert_eq!(paths, ["usr", "usr/lib", "usr/lib/x", "usr/lib/x/y"]);
    }
}
