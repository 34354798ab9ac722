//! Determines if the generator redirected this boot.

use boot_config::TARGET_VARIABLE;
use tracing::warn;

use unit_refresh::Manager;

/// The target to which the generator redirects a boot.
const PIVOT_TARGET: &str = "node-image-pivot.target";

/// The kind of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// The boot leads to the pivot target, and the agent isolates to the original default target.
    Bootstrap,
    /// The boot leads elsewhere. The system is in use, and the agent stops nothing.
    Live,
    /// systemd did not answer. Counts as [`Boot::Live`], and the next call asks again.
    Unknown,
}

impl Boot {
    /// Reads the generator's variable and asks systemd.
    pub async fn look() -> Self {
        let redirected = std::env::var_os(TARGET_VARIABLE).is_some();
        let leads_to_pivot = async { Manager::connect().await?.is_active_or_queued(PIVOT_TARGET).await };
        let answer = if redirected { leads_to_pivot.await.map(Some) } else { Ok(None) };
        let answer = answer.unwrap_or_else(|error| {
            warn!("cannot determine if this boot leads to {PIVOT_TARGET}, asking again later: {error:#}");
            None
        });
        Self::decide(redirected, answer)
    }

    /// Decides by the generator's variable (`redirected`) and systemd's answer. The variable alone proves nothing: it is
    /// also set if an administrator configures an image on a booted system and systemd reloads. The agent must not isolate
    /// there.
    fn decide(redirected: bool, leads_to_pivot: Option<bool>) -> Self {
        match (redirected, leads_to_pivot) {
            (true, Some(true)) => Self::Bootstrap,
            (true, None) => Self::Unknown,
            (false, _) | (true, Some(false)) => Self::Live,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_of_systemd_makes_a_bootstrap_boot() {
        for (redirected, leads_to_pivot, expected) in [
            (false, None, Boot::Live),
            (false, Some(false), Boot::Live),
            (false, Some(true), Boot::Live),
            (true, None, Boot::Unknown),
            (true, Some(false), Boot::Live),
            (true, Some(true), Boot::Bootstrap),
        ] {
            assert_eq!(Boot::decide(redirected, leads_to_pivot), expected, "{redirected} {leads_to_pivot:?}");
        }
    }
}
