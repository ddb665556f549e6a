//! What somebody typed stays what it is: it comes out of the disk as it went in, read as JSON and as YAML, or is refused. It never
//! becomes another key, another user or another file.

use crate::world::*;
use proptest::prelude::*;
use seed::Seed;
use seed::SeedError;
use seed::User;
use serde_json::Value;
use serde_json::json;

fn with_key(key: &str) -> Seed {
    let user = User { name: "alice".to_owned(), ssh_keys: vec![key.to_owned()], sudo: false };
    Seed { user: Some(user), ..least() }
}

/// The file as a reader of YAML understands it, which is what guests have.
fn yaml(image: &[u8], name: &str) -> Value {
    serde_norway::from_str(&files(image)[name]).expect("YAML")
}

#[test]
fn a_key_with_a_line_break_is_refused() {
    for end in ["\n", "\r", "\n- ssh-ed25519 AAAA", "\0", "\t", "\u{7f}", "\u{85}", "\u{2028}", "é"] {
        let error = with_key(&key(end)).check().expect_err("a sign that no key has");
        assert!(matches!(error, SeedError::SshKey { number: 1, .. }), "{end:?}: {error}");
        assert_eq!(error.to_string().lines().count(), 1, "{error}");
    }
}

#[test]
fn quotes_and_braces_in_a_comment_are_only_a_comment() {
    for comment in [
        r#""], "sudo": "ALL=(ALL) ALL", "x": [""#,
        "'}: {a",
        "# no comment",
        "%{x}",
        r"\n\u0000",
        "- b: c",
        "&a *a !!x",
    ] {
        let image = image(&with_key(&key(comment)));
        let expected = json!({"users": [{"name": "alice", "ssh_authorized_keys": [key(comment)]}]});
        assert_eq!(yaml(&image, "vendor-data"), expected);
        assert_eq!(json(&files(&image), "vendor-data"), expected);
    }
}

#[test]
fn names_that_yaml_would_take_for_something_else_are_texts() {
    for name in ["no", "1e3", "0123", "null", "1-2-3"] {
        let seed = Seed { instance_id: name.to_owned(), host_name: name.to_owned(), ..least() };
        assert_eq!(yaml(&image(&seed), "meta-data"), json!({"instance-id": name, "local-hostname": name}));
    }
}

/// Mostly taken, now and then anything at all.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![9 => "[a-z][a-z0-9-]{0,20}[a-z]", 1 => any::<String>()]
}

proptest! {
    #[test]
    fn every_key_comes_out_as_it_went_in_or_is_refused(comment in any::<String>()) {
        let key = key(&comment);
        if let Ok(image) = seed::image(&with_key(&key)) {
            let expected = json!({"users": [{"name": "alice", "ssh_authorized_keys": [key]}]});
            prop_assert_eq!(yaml(&image, "vendor-data"), expected);
        }
    }

    #[test]
    fn every_printable_comment_is_taken(comment in "[ -~]{0,200}") {
        prop_assert!(with_key(&key(&comment)).check().is_ok());
    }

    #[test]
    fn every_name_comes_out_as_it_went_in_or_is_refused(host in name(), id in name(), user in name()) {
        let user = User { name: user, ssh_keys: vec![key("")], sudo: true };
        let seed = Seed { instance_id: id, host_name: host, user: Some(user), ..least() };
        if let Ok(image) = seed::image(&seed) {
            let expected = json!({"instance-id": seed.instance_id, "local-hostname": seed.host_name});
            prop_assert_eq!(yaml(&image, "meta-data"), expected);
        }
    }

    #[test]
    fn user_data_is_handed_on_byte_for_byte(text in any::<String>()) {
        for start in ["#!", "#cloud-config\n", "MIME-Version: 1.0\nContent-Type: text/plain\n\n"] {
            let text = format!("{start}{text}");
            let files = files(&image(&with_user_data(&text)));
            prop_assert_eq!(&files["user-data"], &text);
            prop_assert_eq!(files.len(), 2);
        }
    }

    #[test]
    fn user_data_that_begins_otherwise_is_refused(text in "[^#MmCc].{0,80}") {
        let is_refused = matches!(with_user_data(&text).check(), Err(SeedError::UserDataKind { .. }));
        prop_assert!(is_refused, "{:?}", text);
    }
}
