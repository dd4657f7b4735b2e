//! Builds the guest image from `guest/` and `src/model/`, calling the compiler directly: cargo has no way
//! to build one package's dependency with other code-generation options than the rest.

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

/// The one target that a plain toolchain surely has; the image uses nothing of its operating system.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=src/model");

    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let script = here.join("guest/link.ld");
    let status = Command::new(env::var("RUSTC")?)
        .arg(here.join("guest/main.rs"))
        .args(["--crate-name", "ledger_guest", "--crate-type", "bin", "--edition", "2024"])
        .args(["--target", TARGET, "-o"])
        .arg(out.join("ledger.elf"))
        // Panic messages name source files: keep the build machine's paths out of the image.
        .arg(format!("--remap-path-prefix={}=ledger", here.display()))
        .arg("-Dunsafe_op_in_unsafe_fn")
        .args(["-Copt-level=3", "-Ccodegen-units=1", "-Clto=fat", "-Cpanic=abort", "-Cstrip=symbols"])
        .args(["-Crelocation-model=static", "-Ccode-model=small", "-Cforce-unwind-tables=no"])
        .args(["-Clink-arg=-nostartfiles", "-Clink-arg=-nostdlib", "-Clink-arg=-static"])
        .args(["-Clink-arg=-no-pie", "-Clink-arg=-Wl,--build-id=none", "-Clink-arg=-Wl,--gc-sections"])
        .arg(format!("-Clink-arg=-Wl,-T,{}", script.display()))
        .status()?;
    if !status.success() {
        return Err(format!("the guest image does not build for {TARGET}: {status}").into());
    }
    // A linker that drops what it does not know gives an image no VMM can start: look at once.
    let image = fs::read(out.join("ledger.elf"))?;
    if !image.windows(4).any(|window| window == b"Xen\0") {
        return Err("the guest image has no PVH note".into());
    }
    Ok(())
}
