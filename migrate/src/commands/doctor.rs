//! `migrate doctor`: what works on this host, and what to do about what does not.

use super::{emit, say};
use crate::cli::Common;
use crate::doctor::{Check, Diagnosis, Question, Verdict, examine};
use crate::error::Result;
use crate::exit;
use std::process::ExitCode;

/// How many columns the text fills.
const COLUMNS: usize = 110;

/// Nothing to say.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: migrate doctor
         migrate doctor --json | jq -r '.checks[] | select(.verdict != \"ok\") | .advice'

It changes nothing of the host. What it says holds for the user who runs it.
What is limited works, but not all of it or not as well as it could.

Exit code 0: VMs can be moved from here and to here; 3: they cannot. Containers are not moved yet:
what is said of them decides nothing.")]
pub struct Args {}

/// Runs the verb.
///
/// # Errors
/// None: what is missing is no error of this verb.
pub fn run(common: &Common, _: &Args) -> Result<ExitCode> {
    let diagnosis = examine(&Question::here(common.runtime_dir.as_deref()));
    let code = if diagnosis.is_suitable() { 0 } else { exit::HOST };
    if common.json {
        emit(&serde_json::json!({
            "event": "doctor",
            "suitable": diagnosis.is_suitable(),
            "exit_code": code,
            "version": env!("CARGO_PKG_VERSION"),
            "kernel": kernel(),
            "uid": rustix::process::geteuid().as_raw(),
            "checks": diagnosis.checks,
        }));
    } else {
        lines(&diagnosis).iter().for_each(|line| say(line));
    }
    Ok(ExitCode::from(code))
}

fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn lines(diagnosis: &Diagnosis) -> Vec<String> {
    let width = diagnosis.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut lines = Vec::new();
    let mut group = "";
    for check in &diagnosis.checks {
        if check.group != group {
            group = check.group;
            lines.push(match group {
                "containers" => "containers, which migrate does not move yet".to_owned(),
                _ => group.to_owned(),
            });
        }
        lines.extend(lines_of(check, width));
    }
    lines.push(conclusion(diagnosis));
    lines
}

/// One line, and where something is amiss what it is for and what to do.
fn lines_of(check: &Check, width: usize) -> Vec<String> {
    let head = format!("  {:<7}  {:<width$}  ", check.verdict.word(), check.name);
    let blank = " ".repeat(head.len());
    let mut lines = fold(&check.found, &head, &blank);
    if check.verdict != Verdict::Ok {
        lines.extend(fold(&format!("for {}", check.needed_for), &blank, &blank));
    }
    if let Some(advice) = &check.advice {
        lines.extend(fold(advice, &format!("{blank}→ "), &format!("{blank}  ")));
    }
    lines
}

fn conclusion(diagnosis: &Diagnosis) -> String {
    let in_the_way: Vec<&str> = diagnosis.in_the_way().map(|check| check.name).collect();
    let limited =
        diagnosis.checks.iter().filter(|check| check.verdict != Verdict::Ok && check.group != "containers");
    match (in_the_way.is_empty(), limited.count()) {
        (false, _) => format!("VMs cannot be moved from here or to here: {}", in_the_way.join(", ")),
        (true, 0) => "VMs can be moved from here and to here".into(),
        (true, 1) => "VMs can be moved from here and to here, with one limit".into(),
        (true, limits) => format!("VMs can be moved from here and to here, with {limits} limits"),
    }
}

/// Words on lines of [`COLUMNS`], behind one beginning and then behind another of the same width.
fn fold(text: &str, first: &str, then: &str) -> Vec<String> {
    let mut lines = vec![first.to_owned()];
    let mut is_empty = true;
    for word in text.split(' ') {
        if let Some(line) = lines.last_mut() {
            let fits = line.chars().count() + 1 + word.chars().count() <= COLUMNS;
            if is_empty || fits {
                if !is_empty {
                    line.push(' ');
                }
                line.push_str(word);
            } else {
                lines.push(format!("{then}{word}"));
            }
            is_empty = false;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(verdict: Verdict) -> Check {
        Check {
            group: "kvm",
            name: "kvm",
            verdict,
            required: true,
            found: "API version 12".into(),
            figures: serde_json::Map::new(),
            needed_for: "running a VM",
            advice: (verdict != Verdict::Ok).then(|| "load it ".repeat(20).trim().to_owned()),
        }
    }

    #[test]
    fn what_is_well_takes_a_line_and_what_is_not_says_what_to_do() {
        let text = lines(&Diagnosis { checks: vec![check(Verdict::Ok)] });
        assert_eq!(text, ["kvm", "  ok       kvm  API version 12", "VMs can be moved from here and to here"]);
        let text = lines(&Diagnosis { checks: vec![check(Verdict::Ok), check(Verdict::Missing)] });
        assert_eq!(text.len(), 7, "{text:#?}");
        assert_eq!(text[2], "  missing  kvm  API version 12");
        assert_eq!(text[3], "                for running a VM");
        assert!(text[4].starts_with("                → load it"), "{text:#?}");
        assert!(
            text[5].starts_with("                  load it") || text[5].starts_with("                  it")
        );
        assert!(text.iter().all(|line| line.chars().count() <= COLUMNS), "{text:#?}");
        assert_eq!(text[6], "VMs cannot be moved from here or to here: kvm");
        let text = lines(&Diagnosis { checks: vec![check(Verdict::Limited)] });
        assert!(text.last().unwrap().ends_with("with one limit"), "{text:#?}");
    }

    #[test]
    fn a_word_without_end_stands_alone() {
        assert_eq!(fold(&"x".repeat(300), "a ", "b ").len(), 1);
        assert_eq!(fold("", "a ", "b "), ["a "]);
    }
}
