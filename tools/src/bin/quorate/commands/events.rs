//! `quorate events`: the stream, as lines.

use hostd_api::event::EventsQuery;
use hostd_api::event::StartFrom;
use tools::client::events::StreamItem;

use super::Context;
use crate::args::EventsArgs;
use crate::args::Format;
use crate::exit::Failure;
use crate::output;
use crate::output::EventLines;
use crate::output::Names;

pub async fn run(context: &Context, args: EventsArgs) -> Result<(), Failure> {
    let names = match context.format {
        Format::Table => names(context).await?,
        _ if args.entity.is_empty() => Names::default(),
        _ => names(context).await?,
    };
    let query = query(&args, &names);
    let mut lines = EventLines::new(context.format, names);
    let mut stream = context.client.events(query).await?;
    loop {
        let item = tokio::select! {
            item = stream.next() => item?,
            _ = tokio::signal::ctrl_c(), if args.follow => None,
        };
        match item {
            Some(StreamItem::Event(event)) => output::print(&lines.event(&event)?)?,
            Some(StreamItem::State(state)) => output::print(&lines.state(&state)?)?,
            Some(StreamItem::Synced(_) | StreamItem::Bookmark(_)) => {}
            Some(StreamItem::End(_)) | None => break,
        }
    }
    if let (Format::Table, Some(cursor)) = (context.format, stream.cursor()) {
        eprintln!("to go on from here: quorate events --follow --after {cursor}");
    }
    Ok(())
}

fn query(args: &EventsArgs, names: &Names) -> EventsQuery {
    let begin = match (args.from, &args.after) {
        (Some(begin), _) => Some(begin.into()),
        (None, Some(_)) => None,
        (None, None) if args.follow => Some(StartFrom::Now),
        (None, None) => Some(StartFrom::Oldest),
    };
    let list = |terms: Vec<&str>| (!terms.is_empty()).then(|| terms.join(","));
    EventsQuery {
        after: args.after.clone(),
        from: begin,
        kind: list(args.kind.iter().map(String::as_str).collect()),
        entity: list(args.entity.iter().map(|typed| names.entity(typed)).collect()),
        actor: list(args.actor.iter().map(String::as_str).collect()),
        follow: Some(args.follow),
    }
}

/// Names of what is there now. What was there before keeps its id.
async fn names(context: &Context) -> Result<Names, Failure> {
    let mut names = Names::default();
    for host in context.client.hosts().await?.items {
        names.learn(format!("host/{}", host.id), &host.name);
    }
    for vm in context.client.vms().await?.items {
        names.learn(format!("vm/{}", vm.id), &vm.name);
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;
    use crate::args::Command;

    fn asked(line: &str) -> EventsQuery {
        let Command::Events(args) = Cli::try_parse_from(line.split(' ')).unwrap().command else { panic!() };
        let mut names = Names::default();
        names.learn("vm/77".into(), "web1");
        query(&args, &names)
    }

    #[test]
    fn without_a_beginning_a_look_is_at_all_and_a_follower_at_what_comes() {
        assert_eq!(asked("quorate events").from, Some(StartFrom::Oldest));
        assert_eq!(asked("quorate events").follow, Some(false));
        assert_eq!(asked("quorate events --follow").from, Some(StartFrom::Now));
        assert_eq!(asked("quorate events --after c").from, None);
        assert_eq!(asked("quorate events --follow --from state").from, Some(StartFrom::State));
    }

    #[test]
    fn filters_name_entities_by_id() {
        let query = asked("quorate events --entity vm/web1,host/3 --kind VmDefined --kind VmDeleted");
        assert_eq!(query.entity.as_deref(), Some("vm/77,host/3"));
        assert_eq!(query.kind.as_deref(), Some("VmDefined,VmDeleted"));
    }
}
