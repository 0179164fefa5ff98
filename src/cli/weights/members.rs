//! Reads `MEMBER=WEIGHT` as the proxy would read it from Redis.

use super::Failure;
use crate::balance::{BackendId, Weight};
use crate::redis::weights::MOST_CHANGES;

/// Parses `MEMBER=WEIGHT`. The last `=` separates the two, since the path of a unix socket may contain
/// others.
pub(super) fn parse_members(texts: &[String]) -> Result<Vec<(BackendId, Weight)>, Failure> {
    check_count(texts.len())?;
    let mut members: Vec<(BackendId, Weight)> = Vec::with_capacity(texts.len());
    let mut names = std::collections::HashSet::new();
    for text in texts {
        let invalid = |why: &dyn std::fmt::Display| Failure::Invalid(format!("{text}: {why}"));
        let (member, weight) =
            text.rsplit_once('=').ok_or_else(|| invalid(&"write member=weight, like 10.0.0.1:80=50"))?;
        let member: BackendId = member.parse().map_err(|error| invalid(&error))?;
        let number: f64 = weight.parse().map_err(|_| invalid(&"its weight is not a number"))?;
        let weight = Weight::new(number).map_err(|error| invalid(&error))?;
        if !names.insert(member.clone()) {
            return Err(invalid(&"this member is named twice: keep one"));
        }
        members.push((member, weight));
    }
    Ok(members)
}

pub(super) fn check_count(members: usize) -> Result<(), Failure> {
    if members > MOST_CHANGES {
        return Err(Failure::Invalid(format!("at most {MOST_CHANGES} members can be changed at once")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_checked_as_the_proxy_checks_them() {
        let parse = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
            parse_members(&texts).map_err(|failure| match failure {
                Failure::Invalid(text) => text,
                _ => panic!("another kind of failure"),
            })
        };
        let members = parse(&["10.0.0.1:80=0", "[::1]:80=0.5", "unix:/a=b=1e3"]).expect("members");
        let shown: Vec<String> = members.iter().map(|(id, weight)| format!("{id} {weight}")).collect();
        assert_eq!(shown, ["10.0.0.1:80 0", "[::1]:80 0.5", "unix:/a=b 1000"]);
        for (bad, why) in [
            ("10.0.0.1:80", "member=weight"),
            ("10.0.0.1=5", "no port"),
            ("10.0.0.1:80=", "not a number"),
            ("10.0.0.1:80=five", "not a number"),
            ("10.0.0.1:80=-1", "at least 0"),
            ("10.0.0.1:80=inf", "finite"),
            ("10.0.0.1:80=nan", "finite"),
        ] {
            let error = parse(&[bad]).expect_err(bad);
            assert!(error.starts_with(bad) && error.contains(why), "{error}");
        }
        let twice = parse(&["a:1=1", "a:1=1"]).expect_err("named twice");
        assert!(twice.contains("twice"), "{twice}");
    }
}
