//! `quorate token ...`.

use hostd_api::token::TokenCreate;
use statemachine::TokenId;
use statemachine::state::TokenPurpose;

use super::Context;
use crate::args::Format;
use crate::args::TokenCommand;
use crate::exit::Failure;
use crate::output;
use crate::wait::humane;

pub async fn run(context: &Context, command: TokenCommand) -> Result<(), Failure> {
    match command {
        TokenCommand::Create { purpose, ttl, note } => {
            let purpose = TokenPurpose::from(purpose);
            let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
            let created = context.client.token_create(&TokenCreate { purpose, ttl_ms, note }).await?;
            if context.format == Format::Table {
                let use_it = match purpose {
                    TokenPurpose::Join => "admits one host: `quorate join TOKEN` there",
                    TokenPurpose::Admin | TokenPurpose::Viewer => "keep it in a file for --token-file",
                };
                eprintln!("token {} is valid for {}; {use_it}", created.id, humane(ttl));
            }
            output::show(context.format, &created)
        }
        TokenCommand::List => output::show(context.format, &context.client.tokens().await?),
        TokenCommand::Revoke { id } => {
            let answer = context.client.token_revoke(TokenId(id)).await?;
            output::done(context.format, &answer, &format!("token {id} is revoked (seq {})", answer.seq))
        }
    }
}
