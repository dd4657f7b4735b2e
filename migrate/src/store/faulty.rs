//! A store that fails when told to, for tests: what is built on stores must come out right whatever call goes wrong.

use super::{Attempt, Lease, ObjectInfo, ObjectReader, ObjectWriter, Store};
use crate::error::{Error, Result};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

/// What goes wrong in one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is done, and it is an error.
    Fails,
    /// It is done, and is an error all the same: the answer was lost.
    AnswerLost,
    /// It takes so long.
    Slow(Duration),
    /// Nothing is done in this call and in any behind it. What was finished stays; what was being written is a leftover.
    PowerLost,
    /// It is done, and nothing behind it.
    PowerLostBehind,
}

/// A store that keeps what it is given in another one, and fails when told to. Calls of it, its writers, readers and leases are
/// counted from 0 on.
#[derive(Clone)]
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    plan: Arc<Plan>,
}

struct Plan {
    calls: AtomicU64,
    dead: AtomicBool,
    fault: Box<dyn Fn(u64) -> Option<Fault> + Send + Sync>,
}

impl FaultyStore {
    /// With a fault in the calls that `fault` names one for.
    pub fn new(inner: Arc<dyn Store>, fault: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static) -> Self {
        let plan = Plan { calls: AtomicU64::new(0), dead: AtomicBool::new(false), fault: Box::new(fault) };
        Self { inner, plan: Arc::new(plan) }
    }

    /// With one fault, in this call.
    pub fn at(inner: Arc<dyn Store>, call: u64, fault: Fault) -> Self {
        Self::new(inner, move |number| (number == call).then_some(fault))
    }

    /// With faults in one call of so many, which and what follows from the seed. Power is not lost.
    pub fn seeded(inner: Arc<dyn Store>, seed: u64, one_in: u64) -> Self {
        Self::new(inner, move |number| {
            let random = mix(seed ^ mix(number));
            let fault = match random >> 32 & 3 {
                0 | 1 => Fault::Fails,
                2 => Fault::AnswerLost,
                _ => Fault::Slow(Duration::from_millis(5)),
            };
            random.is_multiple_of(one_in.max(1)).then_some(fault)
        })
    }

    /// How many calls there were.
    pub fn calls(&self) -> u64 {
        self.plan.calls.load(SeqCst)
    }

    /// What is found after the power came back.
    pub fn after_reboot(&self) -> Arc<dyn Store> {
        Arc::clone(&self.inner)
    }
}

/// Spreads a number over 64 bits, as SplitMix64 does.
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

impl Plan {
    fn dead(&self) -> bool {
        self.dead.load(SeqCst)
    }

    /// Does a call, or what is planned instead.
    fn call<T>(&self, what: &str, call: impl FnOnce() -> Result<T>) -> Result<T> {
        let number = self.calls.fetch_add(1, SeqCst);
        let failed = |why: &str| Error::Store(format!("call {number} of the store, {what}, {why}"));
        if self.dead() {
            return Err(failed("finds the power lost"));
        }
        match (self.fault)(number) {
            None => call(),
            Some(Fault::Fails) => Err(failed("fails as planned")),
            Some(Fault::AnswerLost) => {
                call().and_then(|_| Err(failed("is done and its answer lost, as planned")))
            }
            Some(Fault::Slow(time)) => {
                thread::sleep(time);
                call()
            }
            Some(Fault::PowerLost) => {
                self.dead.store(true, SeqCst);
                Err(failed("finds the power lost, as planned"))
            }
            Some(Fault::PowerLostBehind) => {
                let done = call();
                self.dead.store(true, SeqCst);
                done.and_then(|_| Err(failed("is done, and the power lost, as planned")))
            }
        }
    }
}

impl Store for FaultyStore {
    fn place(&self) -> String {
        self.inner.place()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        let inner = self.plan.call(&format!("create {name}"), || self.inner.create(name))?;
        Ok(Box::new(Writer { inner: Some(inner), name: name.to_owned(), plan: Arc::clone(&self.plan) }))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.plan.call(&format!("put {name}"), || self.inner.put(name, bytes))
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        let inner = self.plan.call(&format!("open {name}"), || self.inner.open(name))?;
        Ok(Box::new(Reader { inner, name: name.to_owned(), plan: Arc::clone(&self.plan) }))
    }

    fn contains(&self, name: &str) -> Result<bool> {
        self.plan.call(&format!("look for {name}"), || self.inner.contains(name))
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        self.plan.call(&format!("list {prefix}*"), || self.inner.list(prefix))
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.plan.call(&format!("delete {name}"), || self.inner.delete(name))
    }

    fn leftovers(&self) -> Result<Vec<ObjectInfo>> {
        self.plan.call("list leftovers", || self.inner.leftovers())
    }

    fn remove_leftover(&self, name: &str) -> Result<()> {
        self.plan.call(&format!("remove the leftover {name}"), || self.inner.remove_leftover(name))
    }

    fn try_lock(&self, owner: &str) -> Result<Attempt> {
        match self.plan.call("lock", || self.inner.try_lock(owner))? {
            Attempt::Held(inner) => Ok(Attempt::Held(Box::new(Held { inner, plan: Arc::clone(&self.plan) }))),
            refused => Ok(refused),
        }
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote()
    }
}

struct Writer {
    inner: Option<Box<dyn ObjectWriter>>,
    name: String,
    plan: Arc<Plan>,
}

impl ObjectWriter for Writer {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(inner) = &mut self.inner else { return Ok(()) };
        self.plan.call(&format!("append to {}", self.name), || inner.append(bytes))
    }

    fn finish(mut self: Box<Self>) -> Result<u64> {
        let mut inner = self.inner.take();
        let plan = Arc::clone(&self.plan);
        let finished = plan.call(&format!("finish {}", self.name), || match inner.take() {
            Some(inner) => inner.finish(),
            None => Ok(0),
        });
        // What the call did not take: given up here, or left.
        self.inner = inner;
        finished
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Without power nobody tidies up.
        if self.plan.dead() {
            std::mem::forget(self.inner.take());
        }
    }
}

struct Reader {
    inner: Box<dyn ObjectReader>,
    name: String,
    plan: Arc<Plan>,
}

impl ObjectReader for Reader {
    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.plan.call(&format!("read {} at {offset}", self.name), || self.inner.read_at(offset, buffer))
    }

    fn read_ranges(&self, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<()> {
        self.plan.call(&format!("read ranges of {}", self.name), || self.inner.read_ranges(ranges, buffer))
    }
}

/// Let go of when dropped, power or not: the lock of somebody who is gone is no obstacle.
struct Held {
    inner: Box<dyn Lease>,
    plan: Arc<Plan>,
}

impl Lease for Held {
    fn check(&self) -> Result<()> {
        self.plan.call("check the lock", || self.inner.check())
    }

    fn held_for(&self) -> Duration {
        self.inner.held_for()
    }
}
