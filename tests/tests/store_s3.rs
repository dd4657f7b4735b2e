//! A store in a bucket, of a real server that speaks S3 and that the test starts: every store's contract, uploads in parts, and the lock.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests, which clippy does not see as tests"
)]

#[path = "../../migrate/tests/store/contract.rs"]
mod contract;

use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use migrate::store::{LockTimes, S3Store, Store};
use object_store::aws::AmazonS3Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

const BUCKET: &str = "checkpoints";
const KEY: &str = "the-key";
const SECRET: &str = "the-secret";

/// A server over a directory, with one bucket in it.
struct Server {
    address: SocketAddr,
    runtime: tokio::runtime::Runtime,
    dir: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(BUCKET)).unwrap();
        let service = {
            let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(dir.path()).unwrap());
            builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
            builder.build()
        };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    // A client that goes away is no fault of the server's.
                    http1::Builder::new().serve_connection(TokioIo::new(socket), service).await.ok();
                });
            }
        });
        Self { address, runtime, dir }
    }

    fn builder(&self, secret: &str) -> AmazonS3Builder {
        AmazonS3Builder::new()
            .with_endpoint(format!("http://{}", self.address))
            .with_allow_http(true)
            .with_region("eu-central-1")
            .with_access_key_id(KEY)
            .with_secret_access_key(secret)
    }

    fn store(&self, prefix: &str) -> S3Store {
        S3Store::new(&format!("s3://{BUCKET}/{prefix}"), self.builder(SECRET)).unwrap()
    }

    fn stop(self) -> tempfile::TempDir {
        self.runtime.shutdown_background();
        self.dir
    }
}

#[test]
fn a_store_in_a_bucket_keeps_the_contract() {
    let server = Server::start();
    let next = Cell::new(0);
    contract::check(&|| {
        next.set(next.get() + 1);
        // A deep prefix, one that another begins with, and the bucket itself.
        let prefix = ["", "a/b", "a/bc", "c", "c/d", "e", "f"][next.get() % 7];
        let store = server.store(prefix);
        for info in store.list("").unwrap() {
            store.delete(&info.name).unwrap();
        }
        Arc::new(store)
    });
}

#[test]
fn a_long_object_is_uploaded_in_parts_and_what_a_crash_leaves_of_it_can_be_removed() {
    let server = Server::start();
    let store = server.store("deep/prefix");
    // Two whole parts and a bit, so that the last one is short; then exactly two.
    for (number, length) in [(0, (32 << 20) + 12_345), (1, 32 << 20)] {
        let bytes: Vec<u8> = (0..length).map(|at: u32| (at ^ at >> 11) as u8).collect();
        let name = format!("data/x/segment-{number:05}");
        let mut writer = store.create(&name).unwrap();
        for piece in bytes.chunks(3_000_000) {
            writer.append(piece).unwrap();
        }
        assert!(!store.contains(&name).unwrap());
        // What would be left if this were the end of the process.
        assert_eq!(store.leftovers().unwrap().len(), 1);
        assert_eq!(writer.finish().unwrap(), bytes.len() as u64);
        assert_eq!(store.leftovers().unwrap(), []);
        let reader = store.open(&name).unwrap();
        let mut found = vec![0; bytes.len()];
        reader.read_at(0, &mut found).unwrap();
        assert!(found == bytes);
    }
    let begin = || {
        let mut writer = store.create("data/x/segment-00002").unwrap();
        writer.append(&vec![7; 40 << 20]).unwrap();
        writer
    };
    // Given up: nothing stays.
    drop(begin());
    assert_eq!(store.leftovers().unwrap(), []);
    // As after a crash: nobody tidies up.
    std::mem::forget(begin());
    let left = store.leftovers().unwrap();
    assert_eq!(left.len(), 1);
    assert!(store.list("").unwrap().iter().all(|info| !info.name.ends_with('2')));
    store.remove_leftover(&left[0].name).unwrap();
    assert_eq!(store.leftovers().unwrap(), []);
    // Of two that upload one name, the second to finish is refused.
    let (first, second) = (begin(), begin());
    first.finish().unwrap();
    let text = second.finish().unwrap_err().to_string();
    assert!(text.contains("data/x/segment-00002") && text.contains("already"), "{text}");
    assert_eq!(store.leftovers().unwrap(), []);
}

#[test]
fn a_lock_that_is_not_renewed_is_free_and_its_holder_finds_that_out() {
    let server = Server::start();
    let times = LockTimes { renew: Duration::from_millis(500), stale: Duration::from_secs(4) };
    // The clock of a service counts whole seconds.
    let patience = times.stale + Duration::from_secs(2);
    let store: Arc<dyn Store> = Arc::new(server.store("").with_lock_times(times));
    let lease = store.lock("the first").unwrap();
    let started = Instant::now();
    while started.elapsed() < patience {
        lease.check().unwrap();
        let told = store.lock("another").err().unwrap().to_string();
        assert!(told.contains("the first") && told.contains("try again"), "{told}");
        std::thread::sleep(Duration::from_millis(400));
    }
    drop(lease);
    // One whose process stands still: nothing renews it.
    let idle = LockTimes { renew: Duration::from_secs(3600), ..times };
    let stuck: Arc<dyn Store> = Arc::new(server.store("").with_lock_times(idle));
    let lost = stuck.lock("the stuck one").unwrap();
    lost.check().unwrap();
    let taken = store.lock_within("the next", Duration::from_secs(30)).unwrap();
    taken.check().unwrap();
    let text = lost.check().unwrap_err().to_string();
    assert!(text.contains("lost") && text.contains("nothing more is written"), "{text}");
    // Letting go of what was lost takes nothing from who has it now.
    drop(lost);
    taken.check().unwrap();
    store.lock("a third").err().unwrap();
    drop(taken);
    store.lock("a third").unwrap();
}

#[test]
fn a_service_that_refuses_or_is_gone_is_an_error_that_says_what_to_look_at() {
    let server = Server::start();
    let wrong = S3Store::new(&format!("s3://{BUCKET}"), server.builder("another-secret")).unwrap();
    let text = wrong.put("store.json", b"x").unwrap_err().to_string();
    assert!(text.contains("store.json") && text.contains("s3://checkpoints"), "{text}");
    let none = S3Store::new("s3://no-such-bucket/x", server.builder(SECRET)).unwrap();
    // This service makes a bucket that is written to, and misses one that is read.
    let text = none.open("store.json").err().unwrap().to_string();
    assert!(text.contains("store.json") && text.contains("s3://no-such-bucket/x"), "{text}");
    for place in ["s3://", "s3:///x", "s3://bucket/../x", "/x"] {
        assert!(
            matches!(S3Store::new(place, server.builder(SECRET)), Err(migrate::Error::Usage(_))),
            "{place}"
        );
    }
    let store = server.store("");
    store.put("store.json", b"x").unwrap();
    let reader = store.open("store.json").unwrap();
    let dir = server.stop();
    std::fs::remove_file(dir.path().join(BUCKET).join("store.json")).unwrap();
    let started = Instant::now();
    let text = reader.read_at(0, &mut [0]).unwrap_err().to_string();
    assert!(text.contains("store.json") && text.contains("AWS_ENDPOINT_URL"), "{text}");
    assert!(started.elapsed() < Duration::from_secs(90), "it took {:?}", started.elapsed());
}
