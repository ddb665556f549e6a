//! `quorate cluster ...`.

use hostd_api::cluster::ClusterPatch;

use super::Context;
use crate::args::ClusterCommand;
use crate::exit::Failure;
use crate::output;

pub async fn run(context: &Context, command: ClusterCommand) -> Result<(), Failure> {
    match command {
        ClusterCommand::List => output::show(context.format, &context.client.clusters().await?),
        ClusterCommand::Set { cluster, migration } => {
            let mut patch = ClusterPatch::default();
            migration.apply(&mut patch.migration);
            if patch == ClusterPatch::default() {
                let why = "nothing to change was named; `quorate cluster set --help` says what can be";
                return Err(Failure::Usage(why.to_owned()));
            }
            let answer = context.client.cluster_change(&cluster, &patch).await?;
            output::done(context.format, &answer, &format!("cluster {cluster} is changed (seq {})", answer.seq))
        }
    }
}
