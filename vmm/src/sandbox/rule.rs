//! A rule: a system call that is allowed, and what some of its arguments must be.

use std::fmt;

use libc::c_long;

/// What is known of one argument. All that is asked about are 32-bit numbers to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Test {
    Is(u32),
    /// None of these bits.
    Without(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) argument: u8,
    test: Test,
}

impl Condition {
    /// For the filter: these bits of the argument must have this value.
    pub(super) fn bits(self) -> (u32, u32) {
        match self.test {
            Test::Is(value) => (u32::MAX, value),
            Test::Without(bits) => (bits, 0),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    call: c_long,
    name: &'static str,
    conditions: [Option<Condition>; 2],
    unseen: Option<&'static str>,
}

impl Rule {
    /// Whatever the arguments are.
    pub(super) const fn any(call: c_long, name: &'static str) -> Self {
        Self { call, name, conditions: [None; 2], unseen: None }
    }

    pub(super) const fn is(self, argument: u8, value: u32) -> Self {
        self.and(Condition { argument, test: Test::Is(value) })
    }

    pub(super) const fn without(self, argument: u8, bits: u32) -> Self {
        self.and(Condition { argument, test: Test::Without(bits) })
    }

    const fn and(mut self, condition: Condition) -> Self {
        match self.conditions {
            [None, _] => self.conditions[0] = Some(condition),
            [_, None] => self.conditions[1] = Some(condition),
            // At compile time: the tables are constants.
            _ => panic!("a rule has two conditions at most"),
        }
        self
    }

    /// Needed, and yet not seen when the tests run guests: for this reason.
    pub(super) const fn unseen(mut self, reason: &'static str) -> Self {
        self.unseen = Some(reason);
        self
    }

    pub fn call(&self) -> c_long {
        self.call
    }

    pub(super) fn conditions(&self) -> impl Iterator<Item = Condition> {
        self.conditions.into_iter().flatten()
    }

    /// Why no test sees it used.
    pub fn why_unseen(&self) -> Option<&'static str> {
        self.unseen
    }

    /// Whether it allows this call.
    pub fn allows(&self, call: c_long, arguments: &[u64; 6]) -> bool {
        let fits = |condition: Condition| {
            let (mask, value) = condition.bits();
            // The kernel looks at the lower half too.
            arguments[usize::from(condition.argument)] as u32 & mask == value
        };
        self.call == call && self.conditions().all(fits)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        for condition in self.conditions() {
            match condition.test {
                Test::Is(value) => write!(f, " [{}] = {value:#x}", condition.argument)?,
                Test::Without(bits) => write!(f, " [{}] without {bits:#x}", condition.argument)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_allows_its_call_with_its_arguments_and_no_other() {
        let rule = Rule::any(9, "mmap").without(2, 4).is(4, u32::MAX);
        let arguments = |protection, descriptor| [0, 4096, protection, 0, descriptor, 0];
        assert!(rule.allows(9, &arguments(3, u64::MAX)));
        assert!(rule.allows(9, &arguments(3, u64::from(u32::MAX))), "the kernel takes an int");
        assert!(!rule.allows(9, &arguments(7, u64::MAX)));
        assert!(!rule.allows(9, &arguments(3, 5)));
        assert!(!rule.allows(10, &arguments(3, u64::MAX)));
    }
}
