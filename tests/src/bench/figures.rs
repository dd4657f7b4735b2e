//! From samples to figures: medians and spread, and what they were measured on.

use super::Options;
use super::cases::Case;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Median, least and most of every number in the samples, and how many of them failed.
pub(super) fn summary(samples: &[Value]) -> Value {
    let failed = samples.iter().filter(|sample| sample.get("failed").is_some()).count();
    let mut result = json!({ "runs": samples.len(), "failed": failed });
    let names: BTreeSet<&String> =
        samples.iter().filter_map(Value::as_object).flat_map(|sample| sample.keys()).collect();
    for name in names {
        let mut values: Vec<f64> = samples.iter().filter_map(|sample| sample[name].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        if let (Some(least), Some(most)) = (values.first(), values.last()) {
            result[name] = json!({ "median": values[values.len() / 2], "least": least, "most": most });
        }
    }
    result
}

/// Samples under the names of their cases.
pub(super) fn named(cases: &[&Case], samples: &[Vec<Value>]) -> Value {
    cases.iter().zip(samples).map(|(case, samples)| json!({"case": case.name, "samples": samples})).collect()
}

/// A result, with what it was measured on and how.
pub(super) fn described(options: &Options, result: &Value) -> Value {
    let mut all = json!({
        "commit": output("git", &["describe", "--always", "--dirty"]),
        "kernel": output("uname", &["-sr"]),
        "cpu": cpu(),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "date": output("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]),
        "runs": options.runs,
        "seeds": (1..=options.runs).collect::<Vec<u64>>(),
    });
    super::ours::merge(&mut all, result);
    all
}

/// The first line that a program says.
pub(super) fn output(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output();
    let said = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    said.lines().next().unwrap_or_default().trim().to_owned()
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map(|(_, name)| name.to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_has_the_median_and_the_spread_of_every_number() {
        let samples: Vec<_> = [5.0, 1.0, 3.0].into_iter().map(|ms| json!({"ms": ms, "name": "x"})).collect();
        let result = summary(&samples);
        assert_eq!(result, json!({"runs": 3, "failed": 0, "ms": {"median": 3.0, "least": 1.0, "most": 5.0}}));
    }

    #[test]
    fn a_failed_sample_is_counted_and_takes_nothing_from_the_others() {
        let result = summary(&[json!({"failed": "too slow"}), json!({"ms": 7.0})]);
        assert_eq!(result, json!({"runs": 2, "failed": 1, "ms": {"median": 7.0, "least": 7.0, "most": 7.0}}));
    }
}
