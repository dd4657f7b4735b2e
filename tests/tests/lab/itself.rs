//! The laboratory keeps what it promises to who works with it.

use super::{HOST_KVM, LAB, Pair, laboratory, private_folder, wait_until};
use e2e::lab::access::{Order, TIMED_OUT};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

#[test]
fn commands_in_the_laboratory_end_as_they_do_anywhere() {
    let Some(Pair { a, .. }) = &Pair::new("commands_in_the_laboratory_end_as_they_do_anywhere") else {
        return;
    };
    if std::env::var_os(HOST_KVM).is_some() {
        println!("there is no laboratory in this run");
        return;
    }
    let code = |script: &str| {
        let mut command = a.there(Path::new("sh"));
        command.args(["-c", script]).stdin(Stdio::null()).status().expect("it can be started").code()
    };
    assert_eq!(code("exit 7"), Some(7));
    assert_eq!(code("kill -KILL $$"), Some(137));
    assert_eq!(code("test -c /dev/kvm && grep -q kvm_amd /proc/modules"), Some(0));
    // What is asked for from here ends with who asked.
    let mut asked = a.there(Path::new("sleep"));
    let mut asked = asked.arg("4321").stdin(Stdio::null()).spawn().expect("it can be started");
    let sleeps = || code("ps | grep -q '[s]leep 4321'") == Some(0);
    wait_until("the command to run", sleeps);
    asked.kill().expect("it runs");
    asked.wait().expect("it ends");
    wait_until("the command to end", || !sleeps());
    let lab = &laboratory().lab;
    let host = &lab.hosts[0];
    let order = Order { limit: Some(Duration::from_millis(300)), ..Order::new(&["sleep", "1234"]) };
    let none = &mut std::io::sink();
    assert_eq!(lab.run(host, &order, std::io::empty(), none, &mut std::io::sink()), Ok(TIMED_OUT));
    let missing = lab.put(host, Path::new("/nonexistent"), "/tmp").expect_err("it is not there");
    assert!(missing.contains("/nonexistent"), "{missing}");
}

#[test]
fn a_laboratory_ends_with_who_holds_it() {
    let Some(_turn) = Pair::new("a_laboratory_ends_with_who_holds_it") else { return };
    for killed in [true, false] {
        let folder = private_folder(&format!("migrate-e2e-{}-end-", std::process::id()));
        let mut command = Command::new(LAB);
        command.arg("--folder").arg(folder.path()).args(["keep", "--hosts", "1"]).stdin(Stdio::piped());
        let mut keeper = command.spawn().expect("the laboratory's program can be started");
        wait_until("a host", || machines(folder.path()) == 1);
        if killed {
            keeper.kill().expect("it runs");
        } else {
            drop(keeper.stdin.take());
        }
        wait_until("the host to end", || machines(folder.path()) == 0);
        keeper.wait().expect("it ends");
        assert!(folder.path().join("logs/host1.qemu").exists(), "logs stay");
        assert_eq!(folder.path().join("image").exists(), killed, "a keeper that can removes what it made");
    }
}

/// How many QEMU processes have to do with this folder.
fn machines(folder: &Path) -> usize {
    let folder = folder.to_string_lossy();
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let commands = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    let ours = |command: &Vec<u8>| {
        let command = String::from_utf8_lossy(command);
        command.starts_with("qemu-system") && command.contains(&*folder)
    };
    commands.filter(ours).count()
}
