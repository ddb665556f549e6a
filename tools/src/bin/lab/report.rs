//! What the command line shows of the daemon's answers.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

/// Prints a program's output and answers its exit code.
pub fn finished(answer: &Value) -> Result<ExitCode> {
    let output = |name: &str| -> Result<Vec<u8>> {
        let text = answer[name].as_str().with_context(|| format!("no {name} in the answer"))?;
        BASE64.decode(text).with_context(|| format!("{name} is no base64"))
    };
    std::io::stdout().write_all(&output("stdout")?)?;
    std::io::stderr().write_all(&output("stderr")?)?;
    let code = answer["exit_code"].as_i64().context("no exit code in the answer")?;
    Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Hosts as lines of text.
pub fn status_table(status: &Value) -> String {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["HOST", "ADDRESS", "POWER", "AGENT", "NETWORK", "UNFLUSHED", "HUNG DISKS"]);
    for host in status["hosts"].as_array().into_iter().flatten() {
        let text = |field: &str| host[field].as_str().unwrap_or("-").to_owned();
        let hung: Vec<&str> = host["hung_exports"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        table.add_row([
            text("host"),
            text("address"),
            text("power"),
            if host["agent"] == true { "answers" } else { "silent" }.to_owned(),
            network(&host["link"]),
            format!("{} KiB", host["unflushed_bytes"].as_u64().unwrap_or(0) / 1024),
            if hung.is_empty() { "-".to_owned() } else { hung.join(" ") },
        ]);
    }
    table.to_string()
}

fn network(link: &Value) -> String {
    let number = |field: &str| link[field].as_u64().unwrap_or(0);
    let mut words = Vec::new();
    if link["cut"] == true {
        words.push("cut".to_owned());
    }
    if number("delay_ms") > 0 {
        words.push(format!("delay {} ms", number("delay_ms")));
    }
    if number("loss_percent") > 0 {
        words.push(format!("loss {} %", number("loss_percent")));
    }
    if words.is_empty() { "ok".to_owned() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_table_says_what_is_wrong_with_a_network() {
        assert_eq!(network(&json!({"cut": false, "delay_ms": 0, "loss_percent": 0})), "ok");
        assert_eq!(network(&json!({"cut": true, "delay_ms": 25, "loss_percent": 3})), "cut, delay 25 ms, loss 3 %");
    }
}
