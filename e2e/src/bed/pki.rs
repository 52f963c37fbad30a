//! Certificates of a bed: one authority, one leaf for each program, and a kubeconfig for each that is a client.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::bed::slot::Slot;

/// Who gets a certificate: file name, common name, organisation (the group in Kubernetes' eyes).
const CLIENTS: [(&str, &str, Option<&str>); 6] = [
    ("admin", "admin", Some("system:masters")),
    ("controller-manager", "system:kube-controller-manager", None),
    ("scheduler", "system:kube-scheduler", None),
    ("proxy", "system:kube-proxy", None),
    (
        "kubelet-client",
        "kube-apiserver-kubelet-client",
        Some("system:masters"),
    ),
    ("node", "system:node:", Some("system:nodes")),
];

/// Files of the authority and its leaves.
#[derive(Debug, Clone)]
pub struct Pki {
    folder: PathBuf,
}

impl Pki {
    /// The files under `state`, written or not.
    #[must_use]
    pub fn at(state: &Path) -> Self {
        Self {
            folder: state.join("pki"),
        }
    }

    /// A file of the folder, as text for a command line.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }

    /// The kubeconfig of a client.
    #[must_use]
    pub fn kubeconfig(&self, client: &str) -> String {
        self.file(&format!("{client}.kubeconfig"))
    }

    /// Makes new keys, certificates and kubeconfigs for the bed in `slot`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn create(&self, slot: Slot) -> Result<()> {
        fs::create_dir_all(&self.folder)?;
        fs::set_permissions(&self.folder, fs::Permissions::from_mode(0o700))?;
        let key = KeyPair::generate()?;
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        authority.distinguished_name = name(&slot.name(), None);
        fs::write(self.file("ca.crt"), authority.self_signed(&key)?.pem())?;
        let issuer = Issuer::new(authority, key);

        let tokens = KeyPair::generate()?;
        fs::write(self.file("tokens.key"), tokens.serialize_pem())?;
        fs::write(self.file("tokens.pub"), tokens.public_key_pem())?;

        let api = [
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
        ]
        .map(String::from)
        .into_iter()
        .chain(["kubernetes.default.svc.cluster.local".into(), "127.0.0.1".into()])
        .chain([slot.node_address().to_string(), slot.api_service_address().to_string()])
        .collect();
        self.leaf(&issuer, "apiserver", name("kube-apiserver", None), api)?;
        let kubelet = vec![slot.name(), slot.node_address().to_string()];
        self.leaf(&issuer, "kubelet", name(&slot.name(), None), kubelet)?;
        for (file, common, group) in CLIENTS {
            let common = if common.ends_with(':') {
                format!("{common}{}", slot.name())
            } else {
                common.to_owned()
            };
            self.leaf(&issuer, file, name(&common, group), Vec::new())?;
            fs::write(self.kubeconfig(file), self.kubeconfig_text(slot, file))?;
        }
        Ok(())
    }

    fn leaf(&self, issuer: &Issuer<'_, KeyPair>, file: &str, name: DistinguishedName, sans: Vec<String>) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(sans)?;
        params.distinguished_name = name;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        fs::write(self.file(&format!("{file}.crt")), params.signed_by(&key, issuer)?.pem())?;
        fs::write(self.file(&format!("{file}.key")), key.serialize_pem())?;
        Ok(())
    }

    fn kubeconfig_text(&self, slot: Slot, client: &str) -> String {
        let (bed, server, authority) = (slot.name(), slot.server(), self.file("ca.crt"));
        let (certificate, key) = (self.file(&format!("{client}.crt")), self.file(&format!("{client}.key")));
        format!(
            "apiVersion: v1
kind: Config
clusters: [{{ name: {bed}, cluster: {{ server: \"{server}\", certificate-authority: \"{authority}\" }} }}]
users: [{{ name: {client}, user: {{ client-certificate: \"{certificate}\", client-key: \"{key}\" }} }}]
contexts: [{{ name: {bed}, context: {{ cluster: {bed}, user: {client} }} }}]
current-context: {bed}
"
        )
    }
}

fn name(common: &str, organisation: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(organisation) = organisation {
        name.push(DnType::OrganizationName, organisation);
    }
    name.push(DnType::CommonName, common);
    name
}
