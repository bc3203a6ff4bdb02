//! What the host may ask for: a policy that every request is held against, in a subset of Rego. Without one everything is
//! allowed, at the price of one atomic load.
//!
//! ```text
//! text ─► lexer ─► parser ─► rules (syntax)     request ─► wire bytes ─► input (value)
//!                              └────────► evaluation ◄───────────────────┘
//! ```
//! A request is allowed when the rule with the name of its message is `true`. A request without a rule is denied, and so is
//! one whose evaluation has no end; `AllowRequestsFailingPolicy := true` allows what the others would deny.

mod evaluation;
mod input;
mod lexer;
mod parser;
mod syntax;
#[cfg(test)]
mod tests;
mod value;

use std::{
    fs, io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use bulkhead_protocol::layout::Message as Layout;

use crate::{
    error::{During, Error, Result},
    sync::lock,
};
use evaluation::{Evaluation, Trouble};
use lexer::Fault;
use syntax::Rule;
use value::Value;

/// Where a guest's image keeps its policy, if it has one.
const DEFAULT_FILE: &str = "/etc/kata-opa/default-policy.rego";
/// Bytes of a policy, at most.
const SIZE_LIMIT: usize = 16 << 20;
/// Lines of a policy, at most.
const LINES_LIMIT: usize = 200_000;
/// How many rules may refer to each other in a row.
const LEVELS: usize = 64;
/// The rule that turns every denial into a warning.
const ALLOW_ALL: &str = "AllowRequestsFailingPolicy";
/// Requests that the usual policy that allows everything has no rule for. It means these, too: see [`Rules::forgets`].
const FORGOTTEN: [&str; 5] = [
    "AddSwapPathRequest",
    "GetIPTablesRequest",
    "ResizeVolumeRequest",
    "SetIPTablesRequest",
    "VolumeStatsRequest",
];

/// The policy in force.
#[derive(Default)]
pub(crate) struct Policy {
    active: AtomicBool,
    rules: Mutex<Option<Arc<Rules>>>,
}

impl Policy {
    /// The policy of a file; of the image's own one, if there is one, when the name is empty. A guest whose policy cannot be
    /// read must not take requests.
    pub(crate) fn load(file: &Path) -> Result<Policy> {
        if file.as_os_str().is_empty() {
            Policy::of_image(Path::new(DEFAULT_FILE))
        } else {
            Policy::of_file(file)
        }
    }

    /// A link that leads nowhere is a policy that cannot be read.
    fn of_image(path: &Path) -> Result<Policy> {
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Policy::default()),
            _ => Policy::of_file(path),
        }
    }

    fn of_file(path: &Path) -> Result<Policy> {
        let text = fs::metadata(path).and_then(|metadata| read(path, &metadata));
        let text = text.during(|| format!("read the policy {}", path.display()))?;
        let policy = Policy::default();
        policy.put(&text)?;
        Ok(policy)
    }

    /// Whether a request in its wire form, named after its message, is allowed; [`Error::Denied`] when not.
    pub(crate) fn check(&self, name: &str, request: &[u8]) -> Result<()> {
        if !self.active.load(Ordering::Acquire) {
            return Ok(());
        }
        let rules = lock(&self.rules).clone();
        rules.map_or(Ok(()), |rules| rules.check(name, || input::of_bytes(name, request)))
    }

    /// Replaces the policy, if the one in force allows that.
    pub(crate) fn replace(&self, text: &str) -> Result<()> {
        let name = "SetPolicyRequest";
        let rules = lock(&self.rules).clone();
        if let Some(rules) = rules {
            rules
                .check(name, || Ok(Value::Object(vec![("policy".into(), Value::String(text.to_owned()))])))?;
        }
        self.put(text)
    }

    fn put(&self, text: &str) -> Result<()> {
        let rules = Rules::new(text).map_err(|fault| Error::Invalid(fault.to_string()))?;
        *lock(&self.rules) = Some(Arc::new(rules));
        self.active.store(true, Ordering::Release);
        Ok(())
    }
}

/// Reads a policy, unless it is larger than one may be.
fn read(path: &Path, metadata: &fs::Metadata) -> io::Result<String> {
    if metadata.len() > u64::try_from(SIZE_LIMIT).unwrap_or(u64::MAX) {
        return Err(io::Error::other(format!("it is larger than {SIZE_LIMIT} bytes")));
    }
    fs::read_to_string(path)
}

/// A policy that has been understood.
struct Rules {
    rules: Vec<Rule>,
}

impl Rules {
    fn new(text: &str) -> std::result::Result<Rules, Fault> {
        let fault = |what| Fault { line: 1, column: 1, what };
        if text.len() > SIZE_LIMIT {
            return Err(fault(format!("the policy is larger than {SIZE_LIMIT} bytes")));
        }
        if text.lines().count() > LINES_LIMIT {
            return Err(fault(format!("the policy has more than {LINES_LIMIT} lines")));
        }
        let rules = parser::parse(text)?;
        check_levels(&rules)?;
        Ok(Rules { rules })
    }

    /// The rule's place; rules are in the order of their names.
    fn find(&self, name: &str) -> Option<usize> {
        self.rules.binary_search_by(|rule| rule.name.as_str().cmp(name)).ok()
    }

    fn check(&self, name: &str, input: impl FnOnce() -> std::result::Result<Value, String>) -> Result<()> {
        let reason = match self.decide(name, input) {
            Ok(true) => return Ok(()),
            Ok(false) => String::new(),
            Err(reason) => format!(": {reason}"),
        };
        Err(Error::Denied(format!("{name} is blocked by policy{reason}")))
    }

    /// Whether a request is allowed; an error says why that cannot be told.
    fn decide(
        &self,
        name: &str,
        input: impl FnOnce() -> std::result::Result<Value, String>,
    ) -> std::result::Result<bool, String> {
        let (rule, lenient) = (self.find(name), self.find(ALLOW_ALL));
        if rule.is_none() && self.forgets(name) {
            return Ok(true);
        }
        // Most rules are constants, and need no input.
        if [rule, lenient]
            .into_iter()
            .flatten()
            .all(|rule| self.rules.get(rule).is_some_and(Rule::is_constant))
        {
            return self.evaluate(name, rule, lenient, &Value::Null).map_err(|trouble| trouble.to_string());
        }
        self.evaluate(name, rule, lenient, &input()?).map_err(|trouble| trouble.to_string())
    }

    fn evaluate(
        &self,
        name: &str,
        rule: Option<usize>,
        lenient: Option<usize>,
        input: &Value,
    ) -> std::result::Result<bool, Trouble> {
        let mut evaluation = Evaluation::new(&self.rules, input);
        let mut is_true = |rule: Option<usize>| -> std::result::Result<bool, Trouble> {
            let value = rule.map_or(Ok(None), |rule| evaluation.rule(rule))?;
            Ok(matches!(value, Some(Value::Bool(true))))
        };
        if is_true(rule)? {
            return Ok(true);
        }
        let allowed = is_true(lenient)?;
        if allowed {
            tracing::warn!(
                request = name,
                "allowed although the policy does not allow it: {ALLOW_ALL} is set"
            );
        }
        Ok(allowed)
    }

    /// Whether a policy without a rule for this request only forgets it. The policy that the usual guest images ship to
    /// allow everything has no rule for five requests, and whoever sends it means to allow these as well. It is known by
    /// allowing each of the other requests without a condition; any other policy denies what it does not name.
    fn forgets(&self, name: &str) -> bool {
        FORGOTTEN.contains(&name)
            && Layout::requests().iter().map(Layout::name).filter(|name| !FORGOTTEN.contains(name)).all(
                |name| {
                    let rule = self.find(name).and_then(|rule| self.rules.get(rule));
                    rule.is_some_and(|rule| rule.is_constant() && rule.value() == Some(&Value::Bool(true)))
                },
            )
    }
}

impl Rule {
    /// Whether no input changes it.
    fn is_constant(&self) -> bool {
        self.definitions.iter().all(|definition| definition.body.is_empty())
    }

    /// The value of a constant rule.
    fn value(&self) -> Option<&Value> {
        self.definitions.first().map(|definition| &definition.value).or(self.default.as_ref())
    }
}

/// Refuses rules that refer to themselves, or to each other too deeply. Rules are taken off level by level: first those that
/// refer to none, then those that refer only to these.
fn check_levels(rules: &[Rule]) -> std::result::Result<(), Fault> {
    let mut waiting: Vec<usize> = rules.iter().map(|rule| rule.uses.len()).collect();
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); rules.len()];
    for (user, rule) in rules.iter().enumerate() {
        for (used, _) in &rule.uses {
            if let Some(users) = users.get_mut(*used) {
                users.push(user);
            }
        }
    }
    let mut level: Vec<usize> = (0..rules.len()).filter(|rule| waiting.get(*rule) == Some(&0)).collect();
    for _ in 0..LEVELS {
        let mut next = Vec::new();
        for user in level.iter().filter_map(|rule| users.get(*rule)).flatten() {
            let Some(waiting) = waiting.get_mut(*user) else { continue };
            *waiting -= 1;
            if *waiting == 0 {
                next.push(*user);
            }
        }
        level = next;
    }
    let tangled = rules.iter().zip(&waiting).find(|(_, waiting)| **waiting > 0).map(|(rule, _)| rule);
    let deep = level.first().and_then(|rule| rules.get(*rule));
    match tangled.or(deep) {
        None => Ok(()),
        Some(rule) => {
            let line = rule.uses.first().map_or(1, |(_, line)| *line);
            let what =
                format!("the rule `{}` refers to itself, or to others deeper than {LEVELS}", rule.name);
            Err(Fault { line, column: 1, what })
        }
    }
}

/// Any text is a policy or is refused, and any request gets an answer.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_text(text: &str) {
    let Ok(rules) = Rules::new(text) else { return };
    for request in Layout::requests() {
        let _ = rules.check(request.name(), || input::of_bytes(request.name(), &[]));
    }
}

/// Any bytes are a request or are refused: the first says which.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_input(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let Some(request) = Layout::requests().get(usize::from(*first) % Layout::requests().len()) else {
        return;
    };
    let _ = input::of_bytes(request.name(), bytes);
}

/// A request that is understood is held against a policy that looks at it.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz_request(name: &str, bytes: &[u8]) {
    let Ok(rules) = Rules::new(&format!("package agent_policy\n{name} if {{ some x in input; x == 1 }}"))
    else {
        return;
    };
    let _ = rules.check(name, || input::of_bytes(name, bytes));
}
