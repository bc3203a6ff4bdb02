//! `erofs.multi-layer`: read-only EROFS layers and a writable one, which several storages of one request describe together.
//!
//! ```text
//! storages of the request ──group──► one mount ──find──► its devices ──plan──► mount: upper, lowers, overlay
//! ```
//! A storage belongs if it says `X-kata.multi-layer=true` or has this driver. The upper layer is an ext4 disk
//! (`X-kata.overlay-upper`), or a directory in the guest's memory if there is none. The lowers (`X-kata.overlay-lower`) come
//! top first, or in the order of their partitions if they share a disk (`X-kata.gpt-partitioned=true`,
//! `X-kata.partition-number=N`). `X-kata.mkdir.path=<path>[:<mode>]` has a directory made before the overlay is mounted;
//! `{{ mount 0 }}` in it is the upper layer, `{{ mount 1 }}` the first lower.

use std::{
    fs::Permissions,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_protocol::{agent::Storage, ports::GUEST_STATE};
use rustix::mount::MountFlags;

use super::{
    Job, Mounted, Undo, Wanted, backing,
    block::mount_disk,
    mount::{Options, Target, mount as mount_on},
};
use crate::{
    boot::Guest,
    device::Devices,
    error::{During, Error, Result},
};

/// The name of the driver.
pub(super) const DRIVER: &str = "erofs.multi-layer";

const MARK: &str = "X-kata.";

/// One layer, its `X-kata.` options read.
#[derive(Debug, PartialEq)]
struct Layer {
    upper: bool,
    partition: Option<u32>,
    directories: Vec<Directory>,
    /// For the mount of the layer itself.
    options: Options,
}

/// A directory to make first.
#[derive(Debug, PartialEq)]
struct Directory {
    /// In the first lower layer, not in the upper one.
    lower: bool,
    /// Below the layer, absolute.
    path: String,
    mode: Option<u32>,
}

/// Puts the layers of a request together to one mount, in the place of the first of them.
pub(super) fn group(storages: Vec<Storage>) -> Result<Vec<Wanted>> {
    let (mut wanted, mut layers, mut place) = (Vec::new(), Vec::new(), 0);
    for storage in storages {
        if !belongs(&storage) {
            wanted.push(Wanted { storage, layers: Vec::new() });
            continue;
        }
        if layers.is_empty() {
            place = wanted.len();
        }
        layers.push(storage);
    }
    if !layers.is_empty() {
        let mount_point = plan(&layers)?.first().map(|(index, _)| layers[*index].mount_point.clone());
        let storage = Storage {
            driver: DRIVER.into(),
            mount_point: mount_point.unwrap_or_default(),
            ..Default::default()
        };
        wanted.insert(place, Wanted { storage, layers });
    }
    Ok(wanted)
}

fn belongs(storage: &Storage) -> bool {
    storage.driver == DRIVER || words(storage).any(|option| option == "X-kata.multi-layer=true")
}

fn words(storage: &Storage) -> impl Iterator<Item = &str> {
    storage.options.iter().flat_map(|list| list.split(','))
}

/// The layers with their place in the request: the upper one first, if there is one, then the lowers, top first.
fn plan<'a>(storages: impl IntoIterator<Item = &'a Storage>) -> Result<Vec<(usize, Layer)>> {
    let mut layers = Vec::new();
    for (index, storage) in storages.into_iter().enumerate() {
        layers.push((index, Layer::read(storage)?));
    }
    match layers.iter().filter(|(_, layer)| layer.upper).count() {
        0 | 1 => {}
        uppers => return Err(Error::Invalid(format!("{uppers} upper layers in one request: there is one"))),
    }
    if layers.iter().all(|(_, layer)| layer.upper) {
        return Err(Error::Invalid("an upper layer without a lower one".into()));
    }
    // Stable: lowers that are disks of their own stay in their order.
    layers.sort_by_key(|(_, layer)| (!layer.upper, layer.partition));
    Ok(layers)
}

impl Layer {
    fn read(storage: &Storage) -> Result<Layer> {
        let invalid = |why: &str| Error::Invalid(format!("the layer {:?} {why}", storage.source));
        let (mut upper, mut lower) = (storage.fstype == "ext4", storage.fstype == "erofs");
        let (mut partitioned, mut partition, mut directories, mut own) =
            (false, None, Vec::new(), Vec::new());
        for option in words(storage) {
            let Some(mark) = option.strip_prefix(MARK) else {
                own.push(option.to_owned());
                continue;
            };
            match mark.split_once('=').unwrap_or((mark, "")) {
                ("multi-layer", "true") => {}
                ("overlay-upper", "") => (upper, lower) = (true, false),
                ("overlay-lower", "") => (upper, lower) = (false, true),
                ("gpt-partitioned", "true") => partitioned = true,
                ("partition-number", number) => {
                    let number = number.parse().ok().filter(|number| (1..=128).contains(number));
                    partition = Some(number.ok_or_else(|| invalid(&format!("has {option}, no partition")))?);
                }
                ("mkdir.path", text) => directories.push(Directory::read(text)?),
                // What is to be verified is never mounted unverified.
                _ => return Err(Error::Unsupported(format!("{option} on the layer {:?}", storage.source))),
            }
        }
        match (upper, lower, storage.fstype.as_str()) {
            (true, false, "ext4") | (false, true, "erofs") => {}
            (false, false, _) => return Err(invalid("is neither an upper nor a lower one")),
            (_, _, other) => {
                return Err(invalid(&format!("is {other:?}: the upper one is ext4, the lowers are erofs")));
            }
        }
        if partitioned != partition.is_some() {
            return Err(invalid("needs both X-kata.gpt-partitioned and X-kata.partition-number, or neither"));
        }
        if lower && !directories.is_empty() {
            return Err(invalid("is a lower one, and X-kata.mkdir.path belongs to the upper one"));
        }
        Ok(Layer { upper, partition, directories, options: Options::parse(&own)? })
    }
}

impl Directory {
    /// `{{ mount 0 }}/upper:0755`.
    fn read(text: &str) -> Result<Directory> {
        let invalid = || {
            Error::Invalid(format!(
                "X-kata.mkdir.path={text} is not a path below {{{{ mount 0 }}}} or {{{{ mount 1 }}}}, with an octal mode"
            ))
        };
        let (path, mode) = match text.split_once(':') {
            Some((path, mode)) => (path, Some(u32::from_str_radix(mode, 8).map_err(|_| invalid())?)),
            None => (text, None),
        };
        let rest = |mount| path.strip_prefix(mount).filter(|rest: &&str| rest.starts_with('/'));
        let (lower, path) = match (rest("{{ mount 0 }}"), rest("{{ mount 1 }}")) {
            (Some(path), _) => (false, path),
            (None, Some(path)) => (true, path),
            (None, None) => return Err(invalid()),
        };
        if mode.is_some_and(|mode| mode > 0o7777)
            || Path::new(path).components().any(|part| part.as_os_str() == "..")
        {
            return Err(invalid());
        }
        Ok(Directory { lower, path: path.to_owned(), mode })
    }

    /// Not to be undone: it is part of the layer.
    fn make(&self, upper: &str, lower: &str) -> Result<()> {
        let path = format!("{}{}", if self.lower { lower } else { upper }, self.path);
        let target = Target::directory(&path, &mut Mounted::default())?;
        self.mode.map_or(Ok(()), |mode| {
            std::fs::set_permissions(target.fixed_path(), Permissions::from_mode(mode))
                .during(|| format!("set the mode of {path}"))
        })
    }
}

/// Finds the disk or partition of each layer.
pub(super) async fn find(
    guest: &Arc<Guest>,
    devices: &Devices,
    layers: Vec<Storage>,
) -> Result<Vec<(Storage, PathBuf)>> {
    let mut found = Vec::new();
    if layers.is_empty() {
        return Ok(found);
    }
    let plan = plan(&layers)?;
    for (index, mut storage) in layers.into_iter().enumerate() {
        if storage.driver == DRIVER {
            // The kind of disk shows in its address.
            storage.driver = if storage.source.contains(':') { "scsi" } else { "blk" }.into();
        }
        let disk = backing::find(guest, devices, &storage).await?.ok_or_else(|| {
            Error::Unsupported(format!("a layer on {} storage, which has no device", storage.driver))
        })?;
        let layer = plan.iter().find(|(place, _)| *place == index);
        let node = match layer.and_then(|(_, layer)| layer.partition) {
            None => disk,
            Some(number) => backing::partition(devices, &disk, number).await?,
        };
        found.push((storage, node));
    }
    Ok(found)
}

/// Mounts the layers below a directory of the container's, then the overlay.
pub(super) fn mount(job: &Job, mounted: &mut Mounted) -> Result<()> {
    let plan = plan(job.layers.iter().map(|(storage, _)| storage))?;
    let own = format!("{GUEST_STATE}/{}", job.container.as_deref().unwrap_or("sandbox"));
    Target::directory(&own, mounted)?;
    let base = format!("{own}/multi-layer");
    let base_target = Target::directory(&base, mounted)?;
    let upper = format!("{base}/upper");
    let upper_target = Target::directory(&upper, mounted)?;
    if plan.iter().all(|(_, layer)| !layer.upper) {
        mounted.did(Undo::RemoveTree(upper.clone().into()));
    }
    // The kernel takes one page of options, so the layers have short names there.
    let short = base_target.fixed_path();
    let (mut lowers, mut directories) = (Vec::new(), Vec::new());
    for (index, layer) in plan {
        let Some((storage, node)) = job.layers.get(index) else { continue };
        let mut options = layer.options;
        if layer.upper {
            directories = layer.directories;
            mount_disk(&job.guest, storage, node, &upper_target, &options, mounted)?;
        } else {
            options.flags |= MountFlags::RDONLY;
            let name = format!("lower-{}", lowers.len());
            let target = Target::directory(&format!("{base}/{name}"), mounted)?;
            mount_disk(&job.guest, storage, node, &target, &options, mounted)?;
            lowers.push(format!("{short}/{name}"));
        }
    }
    let first_lower = format!("{base}/lower-0");
    directories.iter().try_for_each(|directory| directory.make(&upper, &first_lower))?;
    for name in ["upper", "work"] {
        Target::directory(&format!("{upper}/{name}"), &mut Mounted::default())?;
    }
    let mut options = Options::parse(&[])?;
    options.data.push(format!("lowerdir={}", lowers.join(":")));
    options.data.push(format!("upperdir={short}/upper/upper"));
    options.data.push(format!("workdir={short}/upper/work"));
    let target = Target::directory(&job.storage.mount_point, mounted)?;
    mount_on("overlay", &target, "overlay", &options, mounted)
}

#[cfg(test)]
mod tests {
    use super::super::disks::{Disk, alone, job, mounts_below, nothing_in, run, writable};
    use super::*;

    fn storage(source: &str, fstype: &str, options: &[&str]) -> Storage {
        Storage {
            driver: "blk".into(),
            source: source.into(),
            fstype: fstype.into(),
            mount_point: format!("/run/kata-containers/{source}/rootfs"),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    const LOWER: [&str; 2] = ["X-kata.overlay-lower", "X-kata.multi-layer=true"];
    const UPPER: [&str; 2] = ["X-kata.overlay-upper", "X-kata.multi-layer=true"];

    #[test]
    fn the_layers_of_a_request_are_one_mount_in_the_place_of_the_first() {
        let plain = |name| storage(name, "ext4", &["ro"]);
        let layers = [storage("01", "erofs", &LOWER), storage("02", "ext4", &UPPER)];
        let [lower, upper] = layers.clone();
        let wanted = group(vec![plain("a"), lower, plain("b"), upper]).unwrap();
        let points: Vec<&str> = wanted.iter().map(|wanted| wanted.storage.source.as_str()).collect();
        assert_eq!(points, ["a", "", "b"]);
        assert_eq!(wanted[1].storage.driver, DRIVER);
        assert_eq!(wanted[1].storage.mount_point, layers[1].mount_point, "the upper one says where");
        assert_eq!(wanted[1].layers, layers);
        assert!(wanted[0].layers.is_empty() && wanted[2].layers.is_empty());
    }

    #[test]
    fn upper_first_then_lowers_as_listed_or_by_partition() {
        let order = |storages: &[Storage]| -> Vec<usize> {
            plan(storages).unwrap().iter().map(|(index, _)| *index).collect()
        };
        let lower = |number: u32| {
            let number = format!("X-kata.partition-number={number}");
            storage("03", "erofs", &["X-kata.multi-layer=true", "X-kata.gpt-partitioned=true", &number])
        };
        let alone = || storage("04", "erofs", &LOWER);
        assert_eq!(order(&[alone(), alone(), storage("02", "ext4", &UPPER)]), [2, 0, 1]);
        assert_eq!(order(&[lower(10), lower(2), lower(1)]), [2, 1, 0]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_what_is_not_there_is_named() {
        let upper = storage("02", "ext4", &UPPER);
        let lower = storage("01", "erofs", &LOWER);
        let with = |option: &'static str| storage("01", "erofs", &[LOWER[0], LOWER[1], option]);
        let invalid = [
            vec![upper.clone()],
            vec![upper.clone(), upper.clone(), lower.clone()],
            vec![storage("01", "xfs", &["X-kata.multi-layer=true"])],
            vec![storage("01", "ext4", &LOWER)],
            vec![storage("01", "erofs", &UPPER), lower.clone()],
            vec![with("X-kata.partition-number=1")],
            vec![with("X-kata.gpt-partitioned=true")],
            vec![with("X-kata.gpt-partitioned=true,X-kata.partition-number=0")],
            vec![with("X-kata.mkdir.path={{ mount 0 }}/upper")],
        ];
        for storages in invalid {
            let error = group(storages.clone()).unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{storages:?}: {error}");
        }
        for option in ["X-kata.dmverity-enabled=true", "X-kata.dmverity.roothash=00", "X-kata.new=1"] {
            let error = group(vec![with(option)]).unwrap_err();
            assert!(matches!(&error, Error::Unsupported(text) if text.contains(option)), "{error}");
        }
    }

    #[test]
    fn directories_are_made_in_a_layer_and_nowhere_else() {
        let read = |text| {
            Directory::read(text).ok().map(|directory| (directory.lower, directory.path, directory.mode))
        };
        assert_eq!(read("{{ mount 0 }}/upper:0700"), Some((false, "/upper".into(), Some(0o700))));
        assert_eq!(read("{{ mount 1 }}/a/b"), Some((true, "/a/b".into(), None)));
        for text in [
            "",
            "/etc",
            "{{ mount 0 }}",
            "{{ mount 0 }}x/y",
            "{{ mount 2 }}/x",
            "{{ mount 0 }}/../x",
            "{{ mount 0 }}/x:rwx",
            "{{ mount 0 }}/x:77777",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    /// Two lowers, top first, each with a file of its name; the upper has one too.
    fn layers(upper: Option<&Disk>, lowers: &[&Disk], path: &str) -> Job {
        let storage =
            |disk: &Disk, fstype, options: &[&str]| (storage("00", fstype, options), disk.node.clone());
        let mkdir = format!("X-kata.mkdir.path={path}");
        let mut layers: Vec<_> = lowers.iter().map(|disk| storage(disk, "erofs", &LOWER)).collect();
        layers.extend(upper.map(|disk| storage(disk, "ext4", &[UPPER[0], UPPER[1], &mkdir])));
        let mount_point = "/run/kata-containers/c1/rootfs".to_owned();
        Job { layers, ..job(Storage { mount_point, ..Default::default() }, None) }
    }

    #[test]
    fn layers_are_one_tree_and_go_without_a_trace() {
        let Some(((first, second), upper)) = Disk::erofs("a").zip(Disk::erofs("b")).zip(Disk::ext4("c"))
        else {
            return;
        };
        alone(|| {
            let job = layers(Some(&upper), &[&first, &second], "{{ mount 0 }}/upper/made:0700");
            let root = "/run/kata-containers/c1/rootfs";
            for round in 0..2 {
                let mounted = run(mount, &job).unwrap();
                for name in ["a", "b"] {
                    assert_eq!(std::fs::read_to_string(format!("{root}/{name}")).unwrap(), name);
                }
                let made = std::fs::metadata(format!("{root}/made")).unwrap();
                assert_eq!(made.permissions().mode() & 0o7777, 0o700);
                // What was written is on the disk, and there again.
                assert_eq!(std::fs::read_to_string(format!("{root}/new")).is_ok(), round == 1);
                std::fs::write(format!("{root}/new"), "x").unwrap();
                mounted.undo(root);
                assert!(mounts_below("/run").is_empty());
                assert!(nothing_in("/run/kata-containers"));
            }
        });
    }

    #[test]
    fn without_a_disk_what_is_written_is_the_guests_own_and_goes() {
        let Some(lower) = Disk::erofs("a") else { return };
        alone(|| {
            let job = layers(None, &[&lower], "");
            for _ in 0..2 {
                let mounted = run(mount, &job).unwrap();
                assert!(!Path::new("/run/kata-containers/c1/rootfs/new").exists());
                assert!(writable("/run/kata-containers/c1/rootfs"));
                mounted.undo("");
                assert!(nothing_in("/run/kata-containers"));
            }
        });
    }

    #[test]
    fn a_failure_half_way_leaves_nothing() {
        let Some(((first, bad), upper)) = Disk::erofs("a").zip(Disk::blank()).zip(Disk::ext4("c")) else {
            return;
        };
        alone(|| {
            let job = layers(Some(&upper), &[&first, &bad], "{{ mount 0 }}/upper");
            let error = run(mount, &job).err().unwrap().to_string();
            assert!(error.contains(bad.node.to_str().unwrap()), "{error}");
            assert!(mounts_below("/run").is_empty());
            assert!(nothing_in("/run/kata-containers"));
        });
    }
}
