//! The fault matrix of [`e2e::matrix`]: the whole table in every run of the tests, more by `MATRIX_CASES`.

use e2e::matrix::{Plan, run};
use e2e::{network, without_kvm};
use std::path::Path;

#[test]
fn one_vm_survives_every_fault_and_its_ledger_is_sound() {
    let name = "one_vm_survives_every_fault_and_its_ledger_is_sound";
    if without_kvm(name) || network::without_root(name) {
        return;
    }
    let plan = Plan::of_environment();
    let ran = run(Path::new(env!("CARGO_BIN_EXE_migrate-under-test")), &plan);
    assert!(plan.only.is_some() || ran >= 300, "{ran} cases are not the matrix");
    assert!(ran > 0, "no case is called so");
}
