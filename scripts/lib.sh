# What the scripts share. Sourced, not run.

skipped=()

step() { printf '\n== %s\n' "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# skip WHAT HOW: says that something is left out and what would change that; said again at the end.
skip() {
  printf 'SKIPPED: %s (%s)\n' "$1" "$2"
  skipped+=("$1")
}

report_skips() {
  local what
  for what in ${skipped[@]+"${skipped[@]}"}; do printf 'SKIPPED in this run: %s\n' "$what"; done
}

# need_command COMMAND PACKAGE: installs a Debian package when its command is missing, or names it without root.
need_command() {
  command -v "$1" >/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing $2 (for $1)"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2" >/dev/null
    command -v "$1" >/dev/null || die "$2 was installed, but $1 is still missing"
  else
    die "$1 is missing: install the Debian package $2, then run this again"
  fi
}

# need_cargo_tool NAME: builds a cargo subcommand when it is missing.
need_cargo_tool() {
  command -v "$1" >/dev/null && return
  echo "building $1 (once; takes some minutes)"
  cargo install --locked --quiet "$1"
}

need_rust() {
  command -v cargo >/dev/null || die 'cargo is missing: install the Rust toolchain (rustup.rs), 1.92 or newer'
}

usable_kvm() { [ -r /dev/kvm ] && [ -w /dev/kvm ]; }

# need_lab: what the laboratory's hosts are made with; Debian's kernel for them is downloaded by the laboratory itself.
need_lab() {
  need_command cc build-essential
  need_command qemu-system-x86_64 qemu-system-x86
  need_command setpriv util-linux
  need_command dpkg dpkg
  need_command /sbin/mke2fs e2fsprogs
  need_command apt-get apt
}

# check_guest: formats and lints the bare guest, which is no cargo target because it is built by a build script.
check_guest() {
  rustfmt --check --edition 2024 guest-images/ledger/guest/main.rs
  mkdir -p target/guest-lints
  clippy-driver --edition 2024 guest-images/ledger/guest/main.rs --crate-type bin -Cpanic=abort \
    --emit=metadata --out-dir target/guest-lints -D warnings
}
