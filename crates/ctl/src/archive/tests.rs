//! Whole archives, built here in the formats' own terms.

use std::io::Write as _;

use serde_json::json;

use super::*;

type Members = Vec<(String, Vec<u8>)>;

fn tar_of(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append_data(&mut header, name, &content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

fn layer(name: &str, text: &str) -> Vec<u8> {
    tar_of(&[(name.to_owned(), text.as_bytes().to_vec())])
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn config_of(layers: &[Vec<u8>], architecture: &str) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    let text = json!({"os": "linux", "architecture": architecture, "config": {"Cmd": ["/hello"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    text.to_string().into_bytes()
}

fn docker_archive(layers: &[Vec<u8>]) -> Members {
    let config = config_of(layers, config::host_architecture());
    let config_name = format!("{}.json", Digest::of(&config).hex());
    let names: Vec<String> = (0..layers.len()).map(|at| format!("{at}/layer.tar")).collect();
    let manifest = json!([{"Config": config_name, "RepoTags": ["a:b"], "Layers": names}]);
    let mut members: Members = names.into_iter().zip(layers.iter().cloned()).collect();
    members.push((config_name, config));
    members.push(("manifest.json".into(), manifest.to_string().into_bytes()));
    members
}

/// Adds a blob and returns its descriptor.
fn blob(members: &mut Members, bytes: &[u8], media_type: &str) -> serde_json::Value {
    let digest = Digest::of(bytes);
    members.push((format!("blobs/sha256/{}", digest.hex()), bytes.to_vec()));
    json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
}

fn oci_manifest(
    members: &mut Members,
    plain: &[Vec<u8>],
    stored: &[Vec<u8>],
    architecture: &str,
) -> serde_json::Value {
    let config = blob(members, &config_of(plain, architecture), "application/vnd.oci.image.config.v1+json");
    let layers: Vec<_> =
        stored.iter().map(|layer| blob(members, layer, "application/vnd.oci.image.layer.v1.tar")).collect();
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers}).to_string();
    blob(members, manifest.as_bytes(), "application/vnd.oci.image.manifest.v1+json")
}

fn with_index(mut members: Members, manifests: Vec<serde_json::Value>) -> Members {
    members.push(("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    members.push((
        "index.json".into(),
        json!({"schemaVersion": 2, "manifests": manifests}).to_string().into_bytes(),
    ));
    members
}

/// Unpacks and returns the directory.
fn unpack(archive: &[u8]) -> Result<(tempfile::TempDir, Execution)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.tar");
    std::fs::write(&path, archive).unwrap();
    let target = dir.path().join("rootfs");
    std::fs::create_dir(&target).unwrap();
    let image = open(&path, dir.path(), &AtomicBool::new(false))?;
    image.unpack(&target, &AtomicBool::new(false))?;
    Ok((dir, image.execution))
}

fn failure(archive: &[u8]) -> String {
    format!("{:#}", unpack(archive).map(|_| ()).unwrap_err())
}

#[test]
fn docker_archives_in_every_wrapping() {
    let layers = vec![layer("hello", "lower"), layer("hello", "upper")];
    let plain = tar_of(&docker_archive(&layers));
    for archive in [plain.clone(), gzip(&plain), zstd::encode_all(&plain[..], 1).unwrap()] {
        let (dir, execution) = unpack(&archive).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("rootfs/hello")).unwrap(), "upper");
        assert_eq!(execution.cmd, ["/hello"]);
    }
}

#[test]
fn oci_archives_with_compressed_layers_and_platforms() {
    let plain = vec![layer("a", "1"), layer("b", "2"), layer("c", "3")];
    let stored = vec![plain[0].clone(), gzip(&plain[1]), zstd::encode_all(&plain[2][..], 1).unwrap()];
    let mut members = Members::new();
    let mut ours = oci_manifest(&mut members, &plain, &stored, config::host_architecture());
    ours["platform"] = json!({"os": "linux", "architecture": config::host_architecture()});
    let mut other = oci_manifest(&mut members, &plain[..1], &stored[..1], "s390x");
    other["platform"] = json!({"os": "linux", "architecture": "s390x"});
    let attestation = json!({"digest": Digest::of(b"absent").to_string(), "size": 1,
        "platform": {"os": "unknown", "architecture": "unknown"}});
    let nested = json!({"manifests": [other, ours, attestation]}).to_string();
    let nested = blob(&mut members, nested.as_bytes(), "application/vnd.oci.image.index.v1+json");
    // Two tags of one image.
    let archive = tar_of(&with_index(members, vec![nested.clone(), nested]));
    let (dir, _) = unpack(&archive).unwrap();
    for (name, text) in [("a", "1"), ("b", "2"), ("c", "3")] {
        assert_eq!(std::fs::read_to_string(dir.path().join("rootfs").join(name)).unwrap(), text);
    }
}

#[test]
fn images_of_other_platforms_are_named() {
    let mut members = Members::new();
    let mut other = oci_manifest(&mut members, &[], &[], "s390x");
    other["platform"] = json!({"os": "linux", "architecture": "s390x"});
    let text = failure(&tar_of(&with_index(members, vec![other])));
    assert!(text.contains("linux/s390x") && text.contains("no image for"), "{text}");
}

#[test]
fn several_images_are_ambiguous() {
    let mut members = Members::new();
    let one = oci_manifest(&mut members, &[], &[], config::host_architecture());
    let plain = vec![layer("x", "")];
    let two = oci_manifest(&mut members, &plain, &plain, config::host_architecture());
    assert!(failure(&tar_of(&with_index(members, vec![one, two]))).contains("2 images"));
}

#[test]
fn damage_is_found() {
    let layers = vec![layer("hello", "text")];
    // A layer that is not what the configuration says.
    let mut members = docker_archive(&layers);
    members[0].1 = layer("hello", "evil");
    let text = failure(&tar_of(&members));
    assert!(text.contains("damaged") && text.contains("0/layer.tar"), "{text}");
    // A configuration that is not what its name says.
    let mut members = docker_archive(&layers);
    members[1].1.push(b' ');
    assert!(failure(&tar_of(&members)).contains("damaged"));
    // A blob that is not what its descriptor says, though it unpacks to the same.
    let mut members = Members::new();
    let manifest = oci_manifest(&mut members, &layers, &[gzip(&layers[0])], config::host_architecture());
    let mut other = gzip(&layers[0]);
    other[4] ^= 1;
    members[1].1 = other;
    assert!(failure(&tar_of(&with_index(members, vec![manifest]))).contains("damaged"));
    // A layer that is not there.
    let mut members = docker_archive(&layers);
    members.remove(0);
    assert!(failure(&tar_of(&members)).contains("not in the archive"));
    let whole = tar_of(&docker_archive(&layers));
    assert!(failure(&whole[..700]).contains("truncated"));
}

#[test]
fn what_is_no_image_says_so() {
    assert!(failure(&layer("hello", "a tar, but no image")).contains("not an image archive"));
    assert!(failure(b"").contains("not an image archive"));
    assert!(failure(&tar_of(&[("manifest.json".into(), b"{}".to_vec())])).contains("manifest.json"));
    assert!(failure(&tar_of(&[("manifest.json".into(), b"[]".to_vec())])).contains("no image"));
    assert!(failure(&tar_of(&[("manifest.json".into(), vec![b' '; 9 << 20])])).contains("too large"));
    let digest = format!("sha256:{}", "../".repeat(21) + "x");
    let index = with_index(Members::new(), vec![json!({"digest": digest, "size": 1})]);
    assert!(failure(&tar_of(&index)).contains("not a digest"));
}

#[test]
fn an_index_that_leads_to_itself_ends() {
    // An index cannot hold its own digest; a deep chain is the same to the reader.
    let mut members = Members::new();
    let mut last = json!([]);
    for _ in 0..6 {
        let index = json!({"manifests": last}).to_string();
        last = json!([blob(&mut members, index.as_bytes(), "application/vnd.oci.image.index.v1+json")]);
    }
    let manifests = last.as_array().unwrap().clone();
    assert!(failure(&tar_of(&with_index(members, manifests))).contains("nested"));
}

#[test]
fn a_stop_ends_the_unpacking() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("i"), tar_of(&docker_archive(&[layer("x", "y")]))).unwrap();
    let image = open(&dir.path().join("i"), dir.path(), &AtomicBool::new(false)).unwrap();
    std::fs::create_dir(dir.path().join("r")).unwrap();
    assert!(image.unpack(&dir.path().join("r"), &AtomicBool::new(true)).is_err());
    std::fs::write(dir.path().join("z"), gzip(&tar_of(&docker_archive(&[layer("x", "y")])))).unwrap();
    assert!(open(&dir.path().join("z"), dir.path(), &AtomicBool::new(true)).is_err());
}
