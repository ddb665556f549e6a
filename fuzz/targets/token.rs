//! The text of a token or a cursor, as somebody typed it: with the checksum that it has, and with the right one.
#![no_main]

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fuzz::keep_samples;
use hostd_api::ApiToken;
use hostd_api::Cursor;
use hostd_api::JoinToken;
use hostd_api::secret::Secret;
use libfuzzer_sys::fuzz_target;
use statemachine::Seq;
use statemachine::SiteId;
use statemachine::state::Fingerprint;

fuzz_target!(init: keep_samples(&samples()), |data: &[u8]| {
    for prefix in ["qrt1.", "qra1."] {
        let hashed = [prefix.as_bytes(), data].concat();
        read(&armoured(prefix, data, &blake3::hash(&hashed).as_bytes()[..8]));
    }
    read(&armoured("qrc1.", data, &blake3::hash(data).as_bytes()[..4]));
    if let Ok(text) = std::str::from_utf8(data) {
        read(text);
    }
});

fn armoured(prefix: &str, fields: &[u8], checksum: &[u8]) -> String {
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode([fields, checksum].concat()))
}

/// Reads a text as each of the three. What is read means the same when it is written again.
fn read(text: &str) {
    if let Ok(token) = JoinToken::from_text(text) {
        assert!(
            (1..=JoinToken::ADDRESSES_MAX).contains(&token.addresses.len()),
            "a host to ask is in every join token"
        );
        assert_eq!(token.to_text().expose(), text.trim(), "one token, one text");
    }
    if let Ok(token) = ApiToken::from_text(text) {
        assert_eq!(token.to_text().expose(), text.trim(), "one token, one text");
        assert_eq!(ApiToken::of_site(text, token.site), Ok(token));
    }
    if let Ok(cursor) = text.parse::<Cursor>() {
        assert_eq!(cursor.to_string(), text, "one cursor, one text");
    }
}

fn samples() -> Vec<Vec<u8>> {
    let (site, secret) = (SiteId(uuid::Uuid::from_u128(7)), Secret::from_bytes([3; 32]));
    let join = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|address| (*address).to_owned()).collect();
        JoinToken { site, ca: Fingerprint([9; 32]), secret: secret.clone(), addresses }.to_text()
    };
    let api = ApiToken { site, secret: secret.clone() }.to_text();
    let all = ["10.0.0.1:7443", "[fd00::2]:7443", "192.168.100.200:7443"];
    let texts = [
        join(&all[..1]).expose().to_owned(),
        join(&all).expose().to_owned(),
        api.expose().to_owned(),
        Cursor { site, seq: Seq(70_000), position: 2 }.to_string(),
        Cursor::after_batch(site, Seq(9)).to_string(),
    ];
    // As texts, and as the fields inside them.
    let fields = |text: &String| {
        let bytes = URL_SAFE_NO_PAD.decode(&text[5..]).expect("it was encoded");
        let checksum_len = if text.starts_with("qrc1.") { 4 } else { 8 };
        bytes[..bytes.len() - checksum_len].to_vec()
    };
    texts.iter().map(|text| text.clone().into_bytes()).chain(texts.iter().map(fields)).collect()
}
