//! Image archives: what `docker save`, `podman save`, `skopeo copy` and `ctr image export` write.
//!
//! [`open`] reads what an image is, cheaply, so that what is not an image fails at once; [`Image::unpack`] does the long
//! part. Nothing in the archive is believed: sizes are bounded, digests are computed, paths stay below the target.

mod config;
mod digest;
mod docker;
mod layer;
#[cfg(test)]
mod layer_tests;
mod meter;
mod oci;
mod source;
mod tarball;
#[cfg(test)]
mod tests;

use std::{io::BufReader, path::Path, sync::atomic::AtomicBool};

use anyhow::{Context as _, Result, bail, ensure};

pub(crate) use config::Execution;
use digest::{Digest, Hashing};
use layer::Layer;
use meter::{MAX_UNPACKED, Metered};
use source::{Section, Source, decompress};
use tarball::Tarball;

use crate::inroot::Root;

/// Docker stops at 127.
const MAX_LAYERS: usize = 1024;

/// An image in an archive, found complete but not yet unpacked.
#[derive(Debug)]
pub(crate) struct Image {
    /// How it wants to be run.
    pub(crate) execution: Execution,
    layers: Vec<Blob>,
}

/// One layer in the archive.
#[derive(Debug)]
struct Blob {
    section: Section,
    name: String,
    /// Digest of the bytes in the archive, where the format has one.
    stored: Option<Digest>,
    /// Digest of the uncompressed layer.
    plain: Digest,
}

/// Opens an archive and finds its image. `spool` is a directory for the uncompressed copy of a compressed archive; making
/// it ends with an error soon after `stop` is set.
pub(crate) fn open(path: &Path, spool: &Path, stop: &AtomicBool) -> Result<Image> {
    let image = || {
        let source = Source::open(path, spool, stop)?;
        // Recent docker writes both; the OCI documents carry more digests.
        if source.has(oci::INDEX) {
            oci::image(source)
        } else if source.has(docker::MANIFEST) {
            docker::image(source)
        } else {
            bail!(
                "it has neither {} nor {}: not an image archive (make one with `docker save`)",
                docker::MANIFEST,
                oci::INDEX
            )
        }
    };
    image().with_context(|| format!("image {}", path.display()))
}

fn check_layer_count(count: usize) -> Result<()> {
    ensure!(count <= MAX_LAYERS, "the image has {count} layers");
    Ok(())
}

impl Image {
    /// Unpacks the layers into `target`, an empty directory, and checks every digest. Stops with an error soon after
    /// `stop` is set.
    pub(crate) fn unpack(&self, target: &Path, stop: &AtomicBool) -> Result<()> {
        let root = Root::open(target).with_context(|| target.display().to_string())?;
        let mut budget = MAX_UNPACKED;
        for blob in &self.layers {
            blob.apply(&root, &mut budget, stop).with_context(|| format!("image layer {}", blob.name))?;
        }
        Ok(())
    }
}

impl Blob {
    fn apply(&self, root: &Root, budget: &mut u64, stop: &AtomicBool) -> Result<()> {
        let mut stored = Hashing::new(self.section.clone());
        {
            let reader = decompress(BufReader::with_capacity(1 << 16, &mut stored))?;
            let mut plain = Hashing::new(Metered { reader, budget, stop });
            Layer::new(root).apply(&mut Tarball::new(&mut plain))?;
            plain.verify(&self.plain)?;
        }
        match &self.stored {
            Some(digest) => stored.verify(digest),
            None => Ok(()),
        }
    }
}
