//! Bundles: storages, snapshots, and descriptors that are wrong.

use std::sync::Arc;

use proptest::prelude::*;
use qcow2_core::{DiskOptions, ErrorKind, Layer, Mem, Result, Storage};
use qcow2_parallels::descriptor::{Descriptor, ImageType};
use qcow2_parallels::{Bundle, OpenOptions, inspect_bytes, open_any};
use qcow2_testkit::contract::LayerContract;

use crate::support::{bytes_of, disk, image, memory, new, read};

const TOP: &str = "{5FBAABE3-6958-40ff-92a7-860e329aab41}";
const ROOT: &str = "{11111111-2222-3333-4444-555555555555}";
const NONE: &str = "{00000000-0000-0000-0000-000000000000}";

fn image_of(guid: &str, kind: &str, file: &str) -> String {
    format!("<Image><GUID>{guid}</GUID><Type>{kind}</Type><File>{file}</File></Image>")
}

fn storage(start: u64, end: u64, images: &str) -> String {
    format!("<Storage><Start>{start}</Start><End>{end}</End><Blocksize>128</Blocksize>{images}</Storage>")
}

fn descriptor(sectors: u64, storages: &str, snapshots: &str) -> String {
    format!(
        "<?xml version='1.0' encoding='UTF-8'?>\n<!-- a disk -->\n<Parallels_disk_image Version=\"1.0\">
        <Disk_Parameters><Disk_size> {sectors} </Disk_size><Padding>0</Padding>
        <Encryption><Engine>{NONE}</Engine><Data/></Encryption></Disk_Parameters>
        <StorageData>{storages}</StorageData>
        <Snapshots>{snapshots}</Snapshots>
        </Parallels_disk_image>"
    )
}

fn shot(guid: &str, parent: &str) -> String {
    format!("<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>")
}

/// Sectors of the two storages.
const FIRST: u64 = 4096;
const SECOND: u64 = 2051;

/// Two storages; of the first both images are expanding, of the second the root is plain.
fn two_by_two() -> String {
    let first = image_of(ROOT, "Compressed", "a&amp;0.hds") + &image_of(TOP, "Compressed", "a1");
    let second = image_of(TOP, "Compressed", "b1") + &image_of(ROOT, "Plain", "<![CDATA[b0]]>");
    let storages = storage(0, FIRST, &first) + &storage(FIRST, FIRST + SECOND, &second);
    descriptor(FIRST + SECOND, &storages, &(shot(ROOT, NONE) + &shot(TOP, ROOT)))
}

/// An image of so many sectors with data at these bytes.
fn expanding(sectors: u64, data: &[(u64, &[u8])]) -> Vec<u8> {
    let storage = memory(&new(sectors * 512, 65536));
    let written = image(storage.clone(), true);
    for (at, bytes) in data {
        written.write_at(Mem::from(*bytes), *at).unwrap();
    }
    written.close().unwrap();
    bytes_of(&*storage)
}

fn open_with(text: Arc<dyn Storage>, files: &[(&str, Vec<u8>)]) -> Result<Box<dyn Layer>> {
    let mut layer = open_any(text, &OpenOptions::default())?;
    for (index, extent) in layer.references().extents.iter().enumerate() {
        let name = std::str::from_utf8(&extent.filename).unwrap();
        let (_, bytes) = files.iter().find(|(file, _)| *file == name).unwrap();
        layer.attach_extent(index, memory(bytes))?;
    }
    Ok(layer)
}

#[test]
fn a_bundle_keeps_the_contract_of_layers() {
    let (low, high) = (disk(FIRST * 512, 1), disk(SECOND * 512, 2));
    let text = two_by_two();
    let mut expected = [&low[..], &high].concat();
    // The root of the first storage was smaller when its snapshot was made.
    expected[1 << 20..(1 << 20) + 70_000].fill(7);
    expected[(FIRST * 512) as usize + 65536..][..65536].fill(9);
    expected[3 << 19..(FIRST * 512) as usize].fill(0);
    let files = [
        ("a&0.hds", expanding(3 << 10, &[(0, &low[..3 << 19])])),
        ("a1", expanding(FIRST, &[(1 << 20, &expected[1 << 20..(1 << 20) + 131_072])])),
        ("b1", expanding(SECOND + 100, &[(65536, &[9; 65536])])),
        ("b0", high),
    ];
    let open = |text: Arc<dyn Storage>| open_with(text, &files);
    LayerContract { name: "bundle", file: text.as_bytes(), open: &open, expected: &expected, below: None }
        .check();
    let mut layer = open(memory(text.as_bytes())).unwrap();
    assert_eq!((layer.format(), layer.files().len(), layer.unit()), ("parallels", 5, Some(65536)));
    assert_eq!(
        layer.make_writable(DiskOptions::default()).unwrap_err().kind(),
        ErrorKind::UnsupportedFeature
    );
    assert!(read(vec![layer.reopen().unwrap()]).unwrap() == expected);
    // Without its files nothing is read.
    let alone = Bundle::open(memory(text.as_bytes()), &OpenOptions::default()).unwrap();
    assert_eq!(alone.descriptor().storages[1].images[1].kind, ImageType::Plain);
    let error = read(vec![Box::new(alone)]).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::ReferenceDenied, Some("extent")));
    let seen = inspect_bytes(text.as_bytes(), None, &OpenOptions::default());
    assert_eq!((seen.bundle.unwrap().size, seen.findings.len()), ((FIRST + SECOND) * 512, 4));
}

#[test]
fn an_image_that_lacks_a_part_of_its_storage_is_refused() {
    let text = descriptor(256, &storage(0, 256, &image_of(ROOT, "Compressed", "a")), "");
    let error = open_with(memory(text.as_bytes()), &[("a", expanding(255, &[]))]).unwrap_err();
    assert_eq!((error.kind(), error.field()), (ErrorKind::Corrupt, Some("Storage")));
    open_with(memory(text.as_bytes()), &[("a", expanding(256, &[]))]).unwrap();
}

#[test]
fn descriptors_that_are_wrong_are_refused() {
    use ErrorKind::{Chain, InvalidHeader, Limit, UnsupportedFeature};
    let one = image_of(ROOT, "Compressed", "a");
    let whole =
        |sectors, images: &str, snapshots: &str| descriptor(sectors, &storage(0, 256, images), snapshots);
    let sound = whole(256, &one, "");
    assert_eq!(Descriptor::parse(sound.as_bytes()).unwrap().size, 256 * 512);
    assert_eq!(Descriptor::parse(format!("\u{feff}{sound}").as_bytes()).unwrap().storages.len(), 1);
    let two = one.clone() + &image_of(TOP, "Compressed", "b");
    let top = format!("<TopGUID>{TOP}</TopGUID>");
    let bomb = "<!DOCTYPE x [<!ENTITY a \"aaaa\">]><Parallels_disk_image><Disk_Parameters><Disk_size>&a;</Disk_size></Disk_Parameters></Parallels_disk_image>";
    let many = (0..5000).map(|n| shot(&n.to_string(), &(n + 1).to_string())).collect::<String>();
    let deep = (0..300).map(|n| shot(&n.to_string(), &(n + 1).to_string())).collect::<String>();
    let cases = [
        (String::new(), InvalidHeader),
        ("<x><Parallels_disk_image/></x>".to_owned(), InvalidHeader),
        (sound.replace("</Parallels_disk_image>", ""), InvalidHeader),
        (sound.clone() + &sound, InvalidHeader),
        (bomb.to_owned(), InvalidHeader),
        (sound.replace("> 256 <", "> 257 <"), InvalidHeader),
        (sound.replace("> 256 <", "> -1 <"), InvalidHeader),
        (sound.replace("<Disk_size> 256 </Disk_size>", ""), InvalidHeader),
        (sound.replace("<End>256", "<End>18446744073709551615"), InvalidHeader),
        (sound.replace("<Start>0", "<Start>1"), InvalidHeader),
        (sound.replace("<Padding>0", "<Padding>1"), UnsupportedFeature),
        (sound.replace("<Engine>{0", "<Engine>{1"), UnsupportedFeature),
        (sound.replace("Compressed", "Ploop"), UnsupportedFeature),
        (descriptor(0, "", ""), InvalidHeader),
        (descriptor(512, &(storage(0, 256, &one) + &storage(256, 512, &one)), ""), InvalidHeader),
        (
            descriptor(512, &(storage(0, 256, &one) + &storage(257, 512, &image_of(ROOT, "Plain", "c"))), ""),
            InvalidHeader,
        ),
        (whole(256, &two, &format!("<TopGUID>{NONE}</TopGUID>")), InvalidHeader),
        (whole(256, &(two.clone() + &one), &(top.clone() + &shot(TOP, ROOT))), InvalidHeader),
        (whole(256, &two.replace("Compressed", "Plain"), &(top.clone() + &shot(TOP, ROOT))), InvalidHeader),
        (whole(256, &two, &(top.clone() + &shot(TOP, ROOT) + &shot(ROOT, TOP))), Chain),
        (whole(256, &two, &(top.clone() + &shot(TOP, TOP))), Chain),
        (whole(256, &two, &(top.clone() + &shot(TOP, NONE) + &shot(TOP, ROOT))), InvalidHeader),
        (whole(256, &two, &("<TopGUID>0</TopGUID>".to_owned() + &deep)), Chain),
        (whole(256, &two, &many), Limit),
        (descriptor(512, &storage(0, 256, &one).repeat(1100), ""), Limit),
        (sound.replace("<StorageData>", &"<StorageData>".repeat(100)), Limit),
        (" ".repeat(2 << 20), Limit),
    ];
    for (text, kind) in cases {
        let error = Descriptor::parse(text.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}: {}", &text[..text.len().min(1000)]);
    }
    assert_eq!(Descriptor::parse(b"<Parallels_disk_image \xff/>").unwrap_err().offset(), Some(22));
    // Where nothing says which image is the disk, it is that of the known GUID; the other one has no part in it.
    let found = Descriptor::parse(whole(256, &two, &shot(TOP, NONE)).as_bytes()).unwrap();
    assert_eq!(found.storages[0].images.iter().map(|image| &*image.name).collect::<Vec<_>>(), ["b"]);
}

proptest! {
    #[test]
    fn any_bytes_give_a_descriptor_or_an_error(at in 0..1500_usize, bytes in prop::collection::vec(any::<u8>(), 0..30)) {
        let mut text = two_by_two().into_bytes();
        let end = (at + bytes.len()).min(text.len());
        text.splice(at.min(end)..end, bytes.iter().copied());
        if let Ok(found) = Descriptor::parse(&text) {
            let last = found.storages.last().unwrap();
            prop_assert!(found.size <= last.end && last.end <= i64::MAX as u64);
        }
        let _ = (Descriptor::parse(&bytes), inspect_bytes(&text, None, &OpenOptions::default()));
    }
}
