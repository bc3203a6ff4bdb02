//! The `docker save` layout: `manifest.json` names the configuration and the layers.

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use super::{
    Blob, Image, config,
    digest::Digest,
    source::{Source, json},
};

/// The document that makes an archive a docker archive.
pub(crate) const MANIFEST: &str = "manifest.json";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Manifest {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

/// Reads the one image of a docker archive.
pub(crate) fn image(source: Source) -> Result<Image> {
    let manifests: Vec<Manifest> = json(MANIFEST, &source.bytes(MANIFEST)?)?;
    let manifest = match manifests.as_slice() {
        [one] => one,
        [] => bail!("{MANIFEST} lists no image"),
        several => {
            let tags: Vec<&str> =
                several.iter().flat_map(|one| one.repo_tags.iter().flatten()).map(String::as_str).collect();
            bail!("it holds {} images ({}); save one image into an archive", several.len(), tags.join(", "));
        }
    };
    let bytes = source.bytes(&manifest.config)?;
    // The configuration is named by its digest: `<hex>.json`, or `blobs/sha256/<hex>`.
    let stem = manifest.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
    if let Ok(digest) = format!("sha256:{stem}").parse::<Digest>() {
        ensure!(
            Digest::of(&bytes) == digest,
            "{} does not have the digest it is named by: the archive is damaged",
            manifest.config
        );
    }
    super::check_layer_count(manifest.layers.len())?;
    let (execution, digests) = config::parse(&manifest.config, &bytes, manifest.layers.len())?;
    let layers = manifest.layers.iter().zip(digests).map(|(name, plain)| {
        Ok(Blob { section: source.section(name)?, name: name.clone(), stored: None, plain })
    });
    let layers = layers.collect::<Result<_>>().context("a layer is missing")?;
    Ok(Image { execution, layers })
}
