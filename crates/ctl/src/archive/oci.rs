//! The OCI image layout: `index.json` leads to a manifest, the manifest to the configuration and the layers, each by digest.

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use super::{
    Blob, Image, config,
    digest::Digest,
    source::{Source, json},
};

/// The document that makes an archive an OCI archive.
pub(crate) const INDEX: &str = "index.json";
/// An index may lead to an index; more than a few times it leads nowhere.
const MAX_NESTING: usize = 4;
const MAX_MANIFESTS: usize = 1000;

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

impl Descriptor {
    fn is_index(&self) -> bool {
        self.media_type.ends_with("image.index.v1+json") || self.media_type.ends_with("manifest.list.v2+json")
    }

    fn fits(&self) -> bool {
        self.platform.as_ref().is_none_or(|platform| {
            platform.os == "linux" && platform.architecture == config::host_architecture()
        })
    }

    fn name(&self) -> Result<(String, Digest)> {
        let digest: Digest = self.digest.parse()?;
        Ok((format!("blobs/sha256/{}", digest.hex()), digest))
    }

    /// The blob's bytes, checked against the digest.
    fn bytes(&self, source: &Source) -> Result<Vec<u8>> {
        let (name, digest) = self.name()?;
        let bytes = source.bytes(&name)?;
        ensure!(
            Digest::of(&bytes) == digest,
            "{name} does not have the digest it is named by: the archive is damaged"
        );
        Ok(bytes)
    }
}

/// Reads the one image for this host out of an OCI archive.
pub(crate) fn image(source: Source) -> Result<Image> {
    let index: Index = json(INDEX, &source.bytes(INDEX)?)?;
    let mut found = Vec::new();
    let mut others = Vec::new();
    collect(&source, index, 0, &mut found, &mut others)?;
    found.sort_by(|one: &Descriptor, other| one.digest.cmp(&other.digest));
    found.dedup_by(|one, other| one.digest == other.digest);
    let manifest = match found.as_slice() {
        [one] => one,
        [] => bail!(
            "it has no image for linux/{}, only for [{}]",
            config::host_architecture(),
            others.join(", ")
        ),
        several => bail!("it holds {} images for this host; save one image into an archive", several.len()),
    };
    read(&source, &manifest.bytes(&source).context("image manifest")?)
}

/// Finds every manifest that is for this host and present.
fn collect(
    source: &Source,
    index: Index,
    nesting: usize,
    found: &mut Vec<Descriptor>,
    others: &mut Vec<String>,
) -> Result<()> {
    ensure!(nesting < MAX_NESTING, "its indexes are nested more than {MAX_NESTING} deep");
    for descriptor in index.manifests {
        ensure!(found.len() + others.len() < MAX_MANIFESTS, "it lists more than {MAX_MANIFESTS} images");
        if descriptor.is_index() {
            let nested: Index = json("image index", &descriptor.bytes(source)?)?;
            collect(source, nested, nesting + 1, found, others)?;
        } else if descriptor.fits() && source.has(&descriptor.name()?.0) {
            found.push(descriptor);
        } else {
            // Exporters keep the index of all platforms and leave the blobs of the others out.
            let platform =
                descriptor.platform.map(|platform| format!("{}/{}", platform.os, platform.architecture));
            others.push(platform.unwrap_or(descriptor.digest));
        }
    }
    Ok(())
}

fn read(source: &Source, manifest: &[u8]) -> Result<Image> {
    let manifest: Manifest = json("image manifest", manifest)?;
    super::check_layer_count(manifest.layers.len())?;
    let (name, _) = manifest.config.name()?;
    let bytes = manifest.config.bytes(source).context("image configuration")?;
    let (execution, digests) = config::parse(&name, &bytes, manifest.layers.len())?;
    let layers = manifest.layers.iter().zip(digests).map(|(layer, plain)| {
        let (name, stored) = layer.name()?;
        let section = source.section(&name)?;
        let size = section.size;
        ensure!(
            layer.size.is_none_or(|expected| expected == size),
            "{name} has {size} bytes, not what its manifest says"
        );
        Ok(Blob { section, name, stored: Some(stored), plain })
    });
    Ok(Image { execution, layers: layers.collect::<Result<_>>().context("a layer is missing or damaged")? })
}
