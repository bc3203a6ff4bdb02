//! Generates the messages, the ttrpc servers and clients, and the table of the requests' fields from `protos/`.

#[path = "build/layout.rs"]
mod layout;

use std::{env, fs, path::PathBuf};

const PROTOS: [&str; 6] = ["types", "oci", "csi", "agent", "health", "confidential_data_hub"];

fn main() {
    println!("cargo:rerun-if-changed=protos");
    println!("cargo:rerun-if-changed=build");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(PROTOS.map(|name| format!("protos/{name}.proto")))
        .include("protos")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()
        .expect("the .proto files are valid");
    // `include!` inside a module refuses inner attributes and inner doc comments.
    for entry in fs::read_dir(&out).expect("OUT_DIR can be listed") {
        let path = entry.expect("OUT_DIR can be listed").path();
        if path.extension().is_some_and(|ext| ext == "rs") {
            let text = fs::read_to_string(&path).expect("generated code is text");
            let kept: String = text
                .lines()
                .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
                .map(|line| format!("{line}\n"))
                .collect();
            fs::write(&path, kept).expect("OUT_DIR can be written");
        }
    }
    fs::write(out.join("layout_table.rs"), layout::table("protos", "agent")).expect("OUT_DIR can be written");
}
