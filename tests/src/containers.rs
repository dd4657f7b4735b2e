//! Containers under test: runc and a CRIU from Debian, which are unpacked into a cache and never installed, and bundles with the tenant in them.

use crate::lab::packages::{cache_dir, run};
use crate::lab::{Context as _, Result};
use crate::{Finished, Host, trusting_pair};
use rustix::fs::FlockOperation;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The release whose CRIU is taken. Debian 12's does not work on kernels of 2025 and later; Debian 13's (4.1.1) cannot write down Internet sockets on
/// Linux 6.18, which no longer tells their `SO_PASSCRED`.
const RELEASE: &str = "forky";

/// How long a container may take for anything that is waited for.
const LIMIT: Duration = Duration::from_secs(60);

/// The programs.
#[derive(Debug, Clone)]
pub struct Tools {
    /// runc.
    pub runc: PathBuf,
    /// CRIU.
    pub criu: PathBuf,
}

impl Tools {
    /// What is in the cache, after a download if it is not there yet. Two that come at once wait for each other.
    ///
    /// # Errors
    /// If Debian's archive cannot be reached.
    pub fn ensure() -> Result<Self> {
        let cache = cache_dir()?.with_file_name("migrate-containers");
        let failed = || cache.display().to_string();
        std::fs::create_dir_all(&cache).context(failed)?;
        let lock = std::fs::File::create(cache.join("lock")).context(failed)?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).context(failed)?;
        let root = cache.join(RELEASE);
        if !root.exists() {
            // Under another name first: what is there is whole.
            let fresh = cache.join(format!("{RELEASE}.new"));
            if fresh.exists() {
                std::fs::remove_dir_all(&fresh).context(failed)?;
            }
            download(&fresh)?;
            std::fs::rename(&fresh, &root).context(failed)?;
        }
        let criu = root.join("bin/criu");
        std::fs::create_dir_all(root.join("bin")).context(failed)?;
        let libraries = root.join("new/usr/lib/x86_64-linux-gnu");
        // Its own libraries are newer than this system's, so it is started by its own loader.
        let script = format!(
            "#!/bin/sh\nexec {0}/ld-linux-x86-64.so.2 --library-path {0} {1} \"$@\"\n",
            libraries.display(),
            root.join("new/usr/sbin/criu").display()
        );
        if std::fs::read_to_string(&criu).ok().as_deref() != Some(&script) {
            std::fs::write(&criu, script).context(failed)?;
            run(&root, "chmod", &["755", "bin/criu"])?;
        }
        Ok(Self { runc: root.join("old/usr/sbin/runc"), criu })
    }

    /// Writes the bundle of a container that runs a program with these arguments, its own root file system with it.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn bundle(&self, bundle: &Path, program: &Path, arguments: &[&str], network: &Network) {
        let rootfs = bundle.join("rootfs");
        for folder in ["proc", "dev", "tmp", "sys", "lib", "lib64"] {
            std::fs::create_dir_all(rootfs.join(folder)).expect("a directory");
        }
        std::fs::copy(program, rootfs.join("tenant")).expect("the program");
        for library in libraries(program).iter().map(Path::new) {
            let into = rootfs.join(library.strip_prefix("/").expect("an absolute path"));
            std::fs::create_dir_all(into.parent().expect("a directory")).expect("a directory");
            std::fs::copy(library, into).expect("a library");
        }
        let spec = Command::new(&self.runc).arg("spec").arg("--bundle").arg(bundle).status();
        assert!(spec.is_ok_and(|status| status.success()), "runc writes no configuration");
        let path = bundle.join("config.json");
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(&path).expect("it is there")).expect("JSON");
        config["process"]["args"] = json!([&["/tenant"], arguments].concat());
        config["process"]["terminal"] = json!(false);
        config["root"]["readonly"] = json!(false);
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("namespaces");
        let is_network = |namespace: &Value| namespace["type"] == "network";
        match network {
            Network::Own => {}
            Network::Shared => namespaces.retain(|namespace| !is_network(namespace)),
            Network::At(path) => namespaces
                .iter_mut()
                .filter(|namespace| is_network(namespace))
                .for_each(|namespace| namespace["path"] = json!(path)),
        }
        std::fs::write(&path, config.to_string()).expect("it is written");
    }

    /// Copies both programs, and what they need, into a folder that can be taken to another machine: `runc`, whose libraries in `lib` must be where that
    /// looks for them, and `criu`, which finds its own in `criu.lib`.
    ///
    /// # Panics
    /// If they cannot be copied.
    pub fn pack(&self, into: &Path) {
        for folder in ["lib", "criu.lib"] {
            std::fs::create_dir_all(into.join(folder)).expect("a directory");
        }
        let copy = |from: &Path, to: &Path| {
            std::fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        };
        copy(&self.runc, &into.join("runc"));
        for library in libraries(&self.runc).iter().map(Path::new) {
            copy(library, &into.join("lib").join(library.file_name().expect("a name")));
        }
        let root = self.criu.ancestors().nth(2).expect("it is in a folder").join("new/usr");
        copy(&root.join("sbin/criu"), &into.join("criu.program"));
        let theirs = root.join("lib/x86_64-linux-gnu");
        for entry in std::fs::read_dir(&theirs).expect("libraries").flatten() {
            if entry.path().is_file() {
                copy(&entry.path(), &into.join("criu.lib").join(entry.file_name()));
            }
        }
        let script = "#!/bin/sh\nhere=${0%/*}\nexec $here/criu.lib/ld-linux-x86-64.so.2 --library-path $here/criu.lib $here/criu.program \"$@\"\n";
        std::fs::write(into.join("criu"), script).expect("a file");
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(into.join("criu"), executable).expect("it is ours");
    }
}

/// The shared libraries of a program, its loader with them.
fn libraries(program: &Path) -> Vec<String> {
    let said = Command::new("ldd").arg(program).output().expect("ldd");
    let text = String::from_utf8_lossy(&said.stdout);
    text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect()
}

/// Downloads and unpacks runc of this system's release and CRIU of a newer one.
fn download(into: &Path) -> Result<()> {
    let failed = || into.display().to_string();
    for folder in ["old", "new", "archives", "apt/lists/partial", "apt/cache/archives/partial"] {
        std::fs::create_dir_all(into.join(folder)).context(failed)?;
    }
    let archives = into.join("archives");
    // Where this system gets its packages from, it gets those of the newer release.
    let format = "$(COMPONENT) $(REPO_URI)";
    let targets = run(into, "apt-get", &["indextargets", "--format", format, "Created-By: Packages"])?;
    let uri =
        targets.lines().find_map(|line| line.strip_prefix("main ").filter(|uri| uri.ends_with("/debian/")));
    let uri = uri.ok_or("apt has no source of Debian's packages: the tests of containers need one")?;
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let source = format!("deb [signed-by={keyring}] {uri} {RELEASE} main\n");
    let apt = into.join("apt");
    std::fs::write(apt.join("sources.list"), source).context(failed)?;
    let option = |name: &str, value: &str| format!("{name}={}", apt.join(value).display());
    let options = [
        option("Dir::State::lists", "lists"),
        option("Dir::Cache", "cache"),
        option("Dir::Etc::sourcelist", "sources.list"),
        "Dir::Etc::sourceparts=-".into(),
        "APT::Sandbox::User=root".into(),
    ];
    let options: Vec<&str> = options.iter().flat_map(|option| ["-o", option]).collect();
    let newer = |program: &str, arguments: &[&str]| run(&archives, program, &[&options, arguments].concat());
    eprintln!("containers: downloading runc and CRIU (once, into {})", into.with_extension("").display());
    newer("apt-get", &["update", "-qq"])?;
    let only = [
        "--recurse",
        "--no-recommends",
        "--no-suggests",
        "--no-conflicts",
        "--no-breaks",
        "--no-replaces",
        "--no-enhances",
    ];
    let depends = newer("apt-cache", &[&["depends"], &only[..], &["criu"]].concat())?;
    let is_package = |line: &&str| line.starts_with("lib") || *line == "criu";
    let packages: Vec<&str> = depends.lines().filter(is_package).filter(|name| !name.contains(':')).collect();
    let unpack = |into: PathBuf| -> Result<()> {
        for entry in std::fs::read_dir(&archives).context(failed)?.flatten() {
            let (package, into) = (entry.path(), into.to_string_lossy().into_owned());
            run(&archives, "dpkg", &["-x", &package.to_string_lossy(), &into])?;
            std::fs::remove_file(entry.path()).context(failed)?;
        }
        Ok(())
    };
    newer("apt-get", &[&["download", "-qq"], &packages[..]].concat())?;
    unpack(into.join("new"))?;
    if run(&archives, "apt-cache", &["show", "runc"]).is_err() {
        run(&archives, "apt-get", &["update", "-qq"])?;
    }
    run(&archives, "apt-get", &["download", "-qq", "-o", "APT::Sandbox::User=root", "runc"])?;
    unpack(into.join("old"))?;
    std::fs::remove_dir_all(&archives).context(failed)?;
    std::fs::remove_dir_all(&apt).context(failed)
}

/// A host's containers: a state directory of runc, and bundles. What is left of them ends with it.
pub struct Yard {
    dir: tempfile::TempDir,
    tools: Tools,
}

/// The network of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// One of its own, without anything.
    Own,
    /// That of whoever starts it.
    Shared,
    /// This namespace.
    At(PathBuf),
}

/// What a tenant said last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Word {
    /// Ticks since it began.
    pub ticks: u64,
    /// The longest gap between two of them.
    pub longest_gap_us: u64,
    /// Pages that it wrote.
    pub written: u64,
    /// How often it has looked through all of its memory.
    pub looks: u64,
    /// Pages that were not as they should be.
    pub wrong: u64,
}

impl Yard {
    /// One without containers.
    ///
    /// # Panics
    /// If the programs cannot be had.
    pub fn new() -> Self {
        let prefix = format!("migrate-yard-{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir().expect("a temporary directory");
        Self { dir, tools: Tools::ensure().expect("runc and CRIU") }
    }

    /// A name that no other container has; on one machine their control groups must differ.
    pub fn name() -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        format!("e2e-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("runc")
    }

    /// A directory for the bundles of containers that arrive.
    pub fn bundles(&self) -> PathBuf {
        self.dir.path().join("bundles")
    }

    /// What `migrate` has to be told about runc and CRIU.
    pub fn arguments(&self) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let Tools { runc, criu } = &self.tools;
        vec![
            "--runc".into(),
            text(runc),
            "--runc-root".into(),
            text(&self.root()),
            "--criu".into(),
            text(criu),
        ]
    }

    fn runc(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.tools.runc);
        command.arg("--root").arg(self.root()).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// As `runc`, with CRIU where runc looks for it, and told how to keep connections still where there are no iptables.
    ///
    /// # Panics
    /// If the file that tells it cannot be written.
    pub fn with_criu(&self, arguments: &[&str]) -> Command {
        let config = self.dir.path().join("criu.conf");
        std::fs::write(&config, "network-lock nftables\n").expect("a file");
        let folder = self.tools.criu.parent().expect("a directory").display();
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = self.runc(arguments);
        command.env("PATH", format!("{folder}:{path}")).env("CRIU_CONFIG_FILE", config);
        command
    }

    /// The bundle of a container that began here.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.dir.path().join(id)
    }

    /// What runc says of a container, if it is there.
    pub fn state(&self, id: &str) -> Option<Value> {
        let output = self.runc(&["state", id]).stdout(Stdio::piped()).output().expect("runc runs");
        output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("JSON"))
    }

    /// How a container is: `running`, `paused`, `stopped`; nothing if it is not there.
    pub fn status(&self, id: &str) -> Option<String> {
        self.state(id)?["status"].as_str().map(str::to_owned)
    }

    /// Starts a tenant with these arguments behind its file's name, and waits until all of its processes have said something.
    ///
    /// # Panics
    /// If it does not run.
    pub fn start(&self, id: &str, tenant: &Path, arguments: &str) {
        self.run(id, tenant, arguments, &Network::Own);
        let children = arguments.split_whitespace().nth(2).map_or(0, |text| text.parse().expect("a number"));
        let until = Instant::now() + LIMIT;
        while self.words(id).len() < 1 + children {
            assert!(
                Instant::now() < until,
                "waited a minute for the processes of {id}: {:?}",
                self.words(id)
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs a program in a container, with these arguments behind its file's name.
    ///
    /// # Panics
    /// If it does not run.
    pub fn run(&self, id: &str, tenant: &Path, arguments: &str, network: &Network) {
        self.make(id, tenant, arguments, network);
        self.go(id);
    }

    /// The same, without running it yet.
    ///
    /// # Panics
    /// If its bundle cannot be made.
    pub fn make(&self, id: &str, tenant: &Path, arguments: &str, network: &Network) {
        let bundle = self.dir.path().join(id);
        let words: Vec<&str> = ["/tmp/out"].into_iter().chain(arguments.split_whitespace()).collect();
        self.tools.bundle(&bundle, tenant, &words, network);
    }

    /// Runs what was made.
    ///
    /// # Panics
    /// If it does not run.
    pub fn go(&self, id: &str) {
        let bundle = self.bundle(id);
        let run = self.runc(&["run", "--detach", "--bundle", &bundle.to_string_lossy(), id]).status();
        assert!(run.is_ok_and(|status| status.success()), "{id} does not run");
    }

    /// The root file system of a container that began here, or came here with its files.
    pub fn rootfs(&self, id: &str) -> PathBuf {
        let bundles = [self.bundle(id), self.bundles().join(id)];
        let [began, came] = bundles.map(|bundle| bundle.join("rootfs"));
        if began.exists() { began } else { came }
    }

    /// The file to which a tenant says how it is.
    pub fn out(&self, id: &str) -> PathBuf {
        self.rootfs(id).join("tmp/out")
    }

    /// What each process of a tenant said last, if it said something; `id` is that under which its files are here.
    pub fn words(&self, id: &str) -> Vec<Word> {
        let text = std::fs::read(self.out(id)).unwrap_or_default();
        let records = String::from_utf8_lossy(&text).replace('\0', "");
        let word = |line: &str| {
            let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            match numbers[..] {
                [ticks, longest_gap_us, written, looks, wrong] => {
                    Some(Word { ticks, longest_gap_us, written, looks, wrong })
                }
                _ => None,
            }
        };
        records.lines().filter_map(word).collect()
    }

    /// The words of a record that is alone in its file; none before there is one.
    pub fn record(&self, id: &str) -> Vec<String> {
        let text = std::fs::read(self.out(id)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).replace('\0', "");
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// Waits until the last words of all processes are so.
    ///
    /// # Panics
    /// After a minute.
    pub fn wait(&self, id: &str, what: &str, wanted: impl Fn(&Word) -> bool) {
        let until = Instant::now() + LIMIT;
        loop {
            let words = self.words(id);
            if !words.is_empty() && words.iter().all(&wanted) {
                return;
            }
            assert!(Instant::now() < until, "waited a minute until {id} {what}; it said {words:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until every process has gone on and has looked through all of its memory again, and found it as it should be.
    ///
    /// # Panics
    /// If it has not, or after a minute.
    pub fn assert_sound(&self, id: &str) {
        let before = self.words(id);
        assert!(!before.is_empty(), "{id} said nothing");
        let until = Instant::now() + LIMIT;
        loop {
            let after = self.words(id);
            assert!(after.iter().all(|word| word.wrong == 0), "{id}: {before:?}, then {after:?}");
            // The first look may have begun before.
            let done = |(after, before): (&Word, &Word)| after.looks >= before.looks + 2;
            if after.len() == before.len() && after.iter().zip(&before).all(done) {
                return;
            }
            assert!(
                Instant::now() < until,
                "waited a minute for {id} to look through its memory: {before:?}, {after:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Takes away what is mounted in it.
    fn unmount(&self) {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = text.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
        for point in points.filter(|point| point.starts_with(self.dir.path())) {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
    }

    /// Kills a container and forgets it.
    pub fn end(&self, id: &str) {
        let _ = self.runc(&["delete", "--force", id]).status();
    }
}

impl Default for Yard {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Yard {
    fn drop(&mut self) {
        let Ok(entries) = std::fs::read_dir(self.root()) else { return self.unmount() };
        for entry in entries.flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            // One that stands still can be ended, too.
            self.end(&id);
        }
        self.unmount();
    }
}

/// One end of a move: a host, and its containers.
pub struct End {
    /// The host.
    pub host: Host,
    /// Its containers.
    pub yard: Yard,
}

impl End {
    /// Two whose hosts trust each other; `program` is the one under test.
    pub fn pair(program: &Path) -> (Self, Self) {
        let (a, b) = trusting_pair(program);
        (Self { host: a, yard: Yard::new() }, Self { host: b, yard: Yard::new() })
    }

    /// The words of a command, and behind them what it has to be told of runc and CRIU.
    pub fn arguments<'a>(own: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
        more.iter().copied().chain(own.iter().map(String::as_str)).collect()
    }

    /// What `migrate receive` is told.
    pub fn receives(&self, name: &str) -> Vec<String> {
        let bundles = self.yard.bundles().to_string_lossy().into_owned();
        let mut arguments =
            vec!["--once".into(), "--name".into(), name.into(), "--containers".into(), bundles];
        arguments.extend(self.yard.arguments());
        arguments
    }

    /// Sends a container to another end, under another name there.
    pub fn send(&self, to: &Self, id: &str, name: &str, more: &[&str]) -> (Finished, Finished) {
        let receives = to.receives(name);
        let (receiver, address) = to.host.receive(&Self::arguments(&receives, &[]));
        let own = self.yard.arguments();
        let words = [&["send", "--container", id, &address], more].concat();
        let sent = self.host.run(&Self::arguments(&own, &words));
        (sent, receiver.finish())
    }

    /// The same, and it arrives. Answers the sender's report.
    ///
    /// # Panics
    /// If it does not.
    pub fn moves(&self, to: &Self, id: &str, name: &str, more: &[&str]) -> Value {
        let (sent, received) = self.send(to, id, name, more);
        let report = sent.success().event("report").expect("a report").clone();
        received.success();
        assert_eq!((self.yard.status(id), to.yard.status(name).as_deref()), (None, Some("running")));
        report
    }
}
