//! The manual names every command and every option, so it cannot fall behind the program.

use clap::CommandFactory;

use crate::args::Cli;

const MANUAL: &str = include_str!("../../../../docs/operations/cli.md");

fn sections() -> Vec<(String, String)> {
    let mut sections: Vec<(String, String)> = Vec::new();
    for line in MANUAL.lines() {
        match (line.strip_prefix("### `"), sections.last_mut()) {
            (Some(title), _) => sections.push((title.trim_end_matches('`').to_owned(), String::new())),
            (None, Some((_, body))) => {
                body.push_str(line);
                body.push('\n');
            }
            (None, None) => {}
        }
    }
    sections
}

fn visit(path: &str, command: &clap::Command, sections: &[(String, String)], missing: &mut Vec<String>) {
    let path = format!("{path} {}", command.get_name()).trim_start().to_owned();
    let mut children = command.get_subcommands().filter(|child| child.get_name() != "help").peekable();
    if children.peek().is_none() {
        let Some((_, body)) = sections.iter().find(|(title, _)| *title == path) else {
            missing.push(format!("section {path}"));
            return;
        };
        if !body.contains(&path) || !body.contains("```") {
            missing.push(format!("{path}: an example"));
        }
        let own = command.get_arguments().filter(|argument| !argument.is_global_set());
        for long in own.filter_map(|argument| argument.get_long()).filter(|long| *long != "help") {
            if !body.contains(&format!("`--{long}")) {
                missing.push(format!("{path}: --{long}"));
            }
        }
        return;
    }
    for child in children {
        visit(&path, child, sections, missing);
    }
}

#[test]
fn the_manual_has_every_command_with_its_options_and_an_example() {
    let mut missing = Vec::new();
    visit("", &Cli::command(), &sections(), &mut missing);
    assert!(missing.is_empty(), "docs/operations/cli.md lacks: {missing:#?}");
}

#[test]
fn the_manual_has_no_command_that_is_gone() {
    for (title, _) in sections() {
        let cli = Cli::command();
        let mut command = &cli;
        for word in title.split(' ').skip(1) {
            command = command.find_subcommand(word).unwrap_or_else(|| panic!("no command `{title}`"));
        }
    }
}
