//! `flowrun cache verify` and `flowrun cache repair`.

use flowrun_cache::CacheReader;
use flowrun_cache::verify::{Damage, Verified, repair as mend, verify as read};

use crate::args::GlobalArgs;
use crate::exit::{Exit, Failure};
use crate::output::{self, bytes, count};
use crate::surroundings::{hold_cache, wait};

/// Reads everything and says what is damaged.
pub(super) fn verify(global: &GlobalArgs) -> Result<Exit, Failure> {
    let found = read(&CacheReader::open(&global.cache_dir));
    let exit = if found.damage.is_empty() {
        Exit::Ok
    } else {
        Exit::Cache
    };
    if global.json {
        output::json(&found)?;
        return Ok(exit);
    }
    let mut text = damage(&found);
    text.push_str(&summary(&found));
    text.push_str(match exit {
        Exit::Ok => ": no damage\n",
        _ => "; `flowrun cache repair` sets it aside, and the next run makes it again\n",
    });
    output::print(&text)?;
    Ok(exit)
}

/// Sets aside what is damaged.
pub(super) fn repair(global: &GlobalArgs) -> Result<Exit, Failure> {
    let found = mend(&hold_cache(global, wait(global))?)?;
    if global.json {
        return output::json(&found);
    }
    let mut text = damage(&found);
    text.push_str(&summary(&found));
    text.push_str(match found.damage.is_empty() {
        true => ": no damage; the index is built anew\n",
        false => "; set aside, and made again when it is needed; the index is built anew\n",
    });
    output::print(&text)
}

fn damage(found: &Verified) -> String {
    let lines = found.damage.iter().map(Damage::to_string);
    lines.map(|line| line + "\n").collect()
}

fn summary(found: &Verified) -> String {
    let damaged = match found.damage.len() {
        0 => String::new(),
        n => format!(", {n} damaged"),
    };
    format!(
        "{} ({}), {}, {} read{damaged}",
        count(found.objects as usize, "object"),
        bytes(found.bytes),
        count(found.results as usize, "result"),
        count(found.completions as usize, "completion")
    )
}
