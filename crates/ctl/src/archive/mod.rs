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
mod oci;
mod source;
#[cfg(test)]
mod tests;
mod tarball;

use std::{
    io::{self, BufReader, Read},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result, bail, ensure};

pub(crate) use config::Execution;
use digest::{Digest, Hashing};
use layer::Layer;
use source::{MAX_UNPACKED, Section, Source, decompress};
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

/// Opens an archive and finds its image. `spool` is a directory for the uncompressed copy of a compressed archive.
pub(crate) fn open(path: &Path, spool: &Path) -> Result<Image> {
    let image = || {
        let source = Source::open(path, spool)?;
        // Recent docker writes both; the OCI documents carry more digests.
        if source.has(oci::INDEX) {
            oci::image(source)
        } else if source.has(docker::MANIFEST) {
            docker::image(source)
        } else {
            bail!("it has neither {} nor {}: not an image archive (make one with `docker save`)", docker::MANIFEST, oci::INDEX)
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

/// A reader that ends with an error when more comes than an image may have, or when somebody stops it.
struct Metered<'a, R> {
    reader: R,
    budget: &'a mut u64,
    stop: &'a AtomicBool,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("stopped"));
        }
        let read = self.reader.read(buffer)?;
        match self.budget.checked_sub(read as u64) {
            Some(left) => *self.budget = left,
            None => return Err(io::Error::other(format!("the image is larger than {} GiB unpacked", MAX_UNPACKED >> 30))),
        }
        Ok(read)
    }
}
