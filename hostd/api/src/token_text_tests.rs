use proptest::prelude::*;

use super::*;

fn join_token() -> JoinToken {
    JoinToken {
        site: SiteId(Uuid::from_u128(0x5151_5151)),
        ca: Fingerprint([7; 32]),
        secret: Secret::from_bytes([9; 32]),
        addresses: vec!["192.0.2.1:7443".to_owned(), "[2001:db8::1]:7443".to_owned()],
    }
}

fn api_token() -> ApiToken {
    ApiToken { site: SiteId(Uuid::from_u128(0x5151_5151)), secret: Secret::from_bytes([9; 32]) }
}

#[test]
fn a_token_survives_copy_and_paste_with_white_space_around_it() {
    let text = join_token().to_text();
    assert_eq!(JoinToken::from_text(&format!("  {}\n", text.expose())), Ok(join_token()));
    let text = api_token().to_text();
    assert_eq!(ApiToken::from_text(&format!("{}\r\n", text.expose())), Ok(api_token()));
}

#[test]
fn every_single_altered_character_is_noticed() {
    let text = join_token().to_text().expose().to_owned();
    for at in JOIN_PREFIX.len()..text.len() {
        let mut altered: Vec<u8> = text.bytes().collect();
        altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
        let altered = String::from_utf8(altered).unwrap();
        assert_eq!(JoinToken::from_text(&altered), Err(TokenTextError::Damaged), "character {at}");
    }
}

#[test]
fn every_truncation_is_noticed() {
    let text = join_token().to_text().expose().to_owned();
    for len in JOIN_PREFIX.len()..text.len() {
        assert_eq!(JoinToken::from_text(&text[..len]), Err(TokenTextError::Damaged), "length {len}");
    }
}

#[test]
fn the_kinds_of_tokens_are_told_apart() {
    let join = join_token().to_text();
    let api = api_token().to_text();
    assert_eq!(JoinToken::from_text(api.expose()), Err(TokenTextError::ApiTokenForJoin));
    assert_eq!(ApiToken::from_text(join.expose()), Err(TokenTextError::JoinTokenForApi));
    assert_eq!(JoinToken::from_text("qrt2.AAAA"), Err(TokenTextError::NewerKind));
    assert!(matches!(JoinToken::from_text("hunter2"), Err(TokenTextError::NotAToken { .. })));
    assert!(matches!(ApiToken::from_text(""), Err(TokenTextError::NotAToken { .. })));
    // Relabelling a join token as an API token does not make it one.
    let relabelled = join.expose().replace(JOIN_PREFIX, API_PREFIX);
    assert_eq!(ApiToken::from_text(&relabelled), Err(TokenTextError::Damaged));
}

#[test]
fn an_api_token_of_another_site_is_foreign() {
    let ours = SiteId(Uuid::from_u128(1));
    let theirs = api_token().site;
    assert_eq!(ApiToken::of_site(api_token().to_text().expose(), ours), Err(TokenTextError::Foreign { theirs, ours }));
    assert_eq!(ApiToken::of_site(api_token().to_text().expose(), theirs), Ok(api_token()));
}

#[test]
fn a_fourth_address_is_left_out_rather_than_making_a_token_that_nobody_reads() {
    let mut token = join_token();
    token.addresses = (1..=4).map(|host| format!("192.0.2.{host}:7443")).collect();
    let read = JoinToken::from_text(token.to_text().expose()).unwrap();
    assert_eq!(read.addresses, token.addresses[..3]);
}

#[test]
fn no_error_repeats_the_text_of_the_token() {
    let secret = join_token().to_text();
    let body = &secret.expose()[JOIN_PREFIX.len()..];
    for text in [format!("qra1.{body}"), format!("qrt9.{body}"), body.to_owned(), format!("qrt1.{body}x")] {
        let words = JoinToken::from_text(&text).unwrap_err().to_string();
        assert!(!words.contains(&body[..16]), "{words}");
    }
}

proptest! {
    #[test]
    fn any_text_is_answered_without_a_panic(text in ".{0,200}", tail in "[A-Za-z0-9_-]{0,300}") {
        let _ = JoinToken::from_text(&text);
        let _ = ApiToken::from_text(&text);
        let (join, api) = (format!("qrt1.{tail}"), format!("qra1.{tail}"));
        prop_assert!(JoinToken::from_text(&join).is_err());
        prop_assert!(ApiToken::from_text(&api).is_err());
    }
}
