//! Container images made by the tests, in the two archive forms.

use std::{fs::File, io::Write, path::Path};

use anyhow::Context;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A layer: a folder whose contents become the layer's.
pub type Layer<'a> = &'a Path;

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn layer_tar(folder: &Path) -> anyhow::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    tar.follow_symlinks(false);
    tar.append_dir_all(".", folder).with_context(|| format!("packing {}", folder.display()))?;
    Ok(tar.into_inner()?)
}

fn append(tar: &mut tar::Builder<impl Write>, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len().try_into()?);
    header.set_mode(0o644);
    header.set_cksum();
    tar.append_data(&mut header, name, bytes)?;
    Ok(())
}

fn image_config(config: &Value, diff_ids: &[String]) -> Vec<u8> {
    json!({
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
    .to_string()
    .into_bytes()
}

/// Writes a docker-archive (`docker save`) named `name`, with the image's `config` (`Cmd`, `Env`...).
pub fn docker_archive(path: &Path, name: &str, config: &Value, layers: &[Layer]) -> anyhow::Result<()> {
    let mut tar = tar::Builder::new(File::create(path)?);
    let (mut names, mut diff_ids) = (Vec::new(), Vec::new());
    for layer in layers {
        let bytes = layer_tar(layer)?;
        let id = digest(&bytes);
        append(&mut tar, &format!("{id}/layer.tar"), &bytes)?;
        names.push(format!("{id}/layer.tar"));
        diff_ids.push(format!("sha256:{id}"));
    }
    let config = image_config(config, &diff_ids);
    let config_name = format!("{}.json", digest(&config));
    append(&mut tar, &config_name, &config)?;
    let manifest = json!([{"Config": config_name, "RepoTags": [name], "Layers": names}]);
    append(&mut tar, "manifest.json", manifest.to_string().as_bytes())?;
    tar.finish()?;
    Ok(())
}

/// Writes an OCI archive (`oci-layout`, `index.json`, `blobs`) named `name`.
pub fn oci_archive(path: &Path, name: &str, config: &Value, layers: &[Layer]) -> anyhow::Result<()> {
    let mut tar = tar::Builder::new(File::create(path)?);
    append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let mut blob = |bytes: &[u8], media: &str| -> anyhow::Result<Value> {
        let id = digest(bytes);
        append(&mut tar, &format!("blobs/sha256/{id}"), bytes)?;
        Ok(json!({"mediaType": media, "digest": format!("sha256:{id}"), "size": bytes.len()}))
    };
    let (mut entries, mut diff_ids) = (Vec::new(), Vec::new());
    for layer in layers {
        let bytes = layer_tar(layer)?;
        diff_ids.push(format!("sha256:{}", digest(&bytes)));
        entries.push(blob(&bytes, "application/vnd.oci.image.layer.v1.tar")?);
    }
    let config = blob(&image_config(config, &diff_ids), "application/vnd.oci.image.config.v1+json")?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": entries,
    });
    let mut entry = blob(manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json")?;
    entry["platform"] = json!({"os": "linux", "architecture": "amd64"});
    entry["annotations"] =
        json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name});
    append(&mut tar, "index.json", json!({"schemaVersion": 2, "manifests": [entry]}).to_string().as_bytes())?;
    tar.finish()?;
    Ok(())
}
