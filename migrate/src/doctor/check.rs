//! What is said of one thing, and of all.

use serde::Serialize;
use serde_json::{Map, Value};

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It works.
    Ok,
    /// It works, but not all of it or not as well as it could.
    Limited,
    /// It does not work.
    Missing,
}

impl Verdict {
    /// Its word, as JSON has it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }
}

/// One thing that was looked at. Names stay as they are: scripts go by them.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What it belongs to.
    pub group: &'static str,
    /// Its name.
    pub name: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// Whether no VM can be moved where it is missing.
    pub required: bool,
    /// What was found, for people.
    pub found: String,
    /// The same in numbers and words, with units in their names.
    pub figures: Map<String, Value>,
    /// What it is for.
    pub needed_for: &'static str,
    /// What to do, unless it is well.
    pub advice: Option<String>,
}

impl Check {
    /// Something that is well, until more is said.
    pub(super) fn new(
        group: &'static str,
        name: &'static str,
        needed_for: &'static str,
        found: impl Into<String>,
    ) -> Self {
        Self {
            group,
            name,
            verdict: Verdict::Ok,
            required: false,
            found: found.into(),
            figures: Map::new(),
            needed_for,
            advice: None,
        }
    }

    pub(super) fn required(mut self) -> Self {
        self.required = true;
        self
    }

    pub(super) fn figure(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.figures.insert(name.to_owned(), value.into());
        self
    }

    pub(super) fn limited(self, advice: impl Into<String>) -> Self {
        self.because(Verdict::Limited, advice.into())
    }

    pub(super) fn missing(self, advice: impl Into<String>) -> Self {
        self.because(Verdict::Missing, advice.into())
    }

    /// `limited` where the condition holds.
    pub(super) fn limited_if(self, condition: bool, advice: impl Into<String>) -> Self {
        if condition { self.limited(advice) } else { self }
    }

    fn because(mut self, verdict: Verdict, advice: String) -> Self {
        (self.verdict, self.advice) = (verdict, Some(advice));
        self
    }
}

/// All that was looked at.
#[derive(Debug, Clone)]
pub struct Diagnosis {
    /// One behind the other, those of a group together.
    pub checks: Vec<Check>,
}

impl Diagnosis {
    /// What stands in the way of moving any VM.
    pub fn in_the_way(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.required && check.verdict == Verdict::Missing)
    }

    /// Whether VMs can be moved from here and to here.
    pub fn is_suitable(&self) -> bool {
        self.in_the_way().next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_required_and_missing_stands_in_the_way() {
        let check = || Check::new("group", "name", "all", "something");
        let diagnosis = |checks: Vec<Check>| Diagnosis { checks }.is_suitable();
        assert!(diagnosis(vec![]));
        assert!(diagnosis(vec![check().required(), check().missing("x"), check().required().limited("x")]));
        assert!(!diagnosis(vec![check(), check().required().missing("x")]));
        assert_eq!(check().limited_if(false, "x").verdict, Verdict::Ok);
        for verdict in [Verdict::Ok, Verdict::Limited, Verdict::Missing] {
            assert_eq!(serde_json::to_value(verdict).unwrap(), verdict.word());
        }
    }
}
