#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::layout::layout;
use super::svg::{Anchor, LETTER, Picture, Shape};
use super::*;
use crate::report::timeline::Timeline;
use crate::report::timeline::tests::pivot;
use crate::report::{LastError, SpanResult, State, Status, Subject};
use node_store::{LayerRead, Work};

fn report(timeline: Timeline) -> Report {
    let status =
        Status { digest: Some(format!("sha256:{}", "0a".repeat(32))), state: State::Done, ..Status::default() };
    let (version, boot_unix_ms) = ("0.1.0".to_owned(), 1_795_000_000_000);
    Report { schema: 1, version, boot_unix_ms, now_ms: 200_000, status, timeline }
}

/// Returns the box of a text: left, top, right, bottom.
fn text_box(shape: &Shape) -> Option<(f64, f64, f64, f64)> {
    let Shape::Text { x, y, anchor, text, .. } = shape else { return None };
    let width = text.len() as f64 * LETTER;
    let left = match anchor {
        Anchor::Start => *x,
        Anchor::Middle => x - width / 2.0,
        Anchor::End => x - width,
    };
    Some((left, y - 9.0, left + width, y + 3.0))
}

/// Returns two texts that overlap, or a shape outside the picture.
fn fault(picture: &Picture) -> Option<String> {
    let texts: Vec<_> = picture.shapes.iter().filter_map(|shape| Some((shape, text_box(shape)?))).collect();
    for (at, (shape, one)) in texts.iter().enumerate() {
        if one.0 < 0.0 || one.1 < 0.0 || one.2 > picture.width || one.3 > picture.height {
            return Some(format!("{shape:?} is outside of {} x {}", picture.width, picture.height));
        }
        let overlaps = |(_, two): &&(&Shape, (f64, f64, f64, f64))| {
            one.0 < two.2 && two.0 < one.2 && one.1 < two.3 && two.1 < one.3
        };
        if let Some((other, _)) = texts[at + 1..].iter().find(overlaps) {
            return Some(format!("{shape:?} overlaps {other:?}"));
        }
    }
    let outside =
        |shape: &&Shape| matches!(shape, Shape::Bar { x, width, .. } if *x < 0.0 || x + width > picture.width);
    picture.shapes.iter().find(outside).map(|shape| format!("{shape:?} is outside"))
}

#[test]
fn few_layers_have_rows_and_many_share_lanes() {
    let of = |layers| layout(&report(pivot(layers)));
    let has = |picture: &Picture, part: &str| {
        picture.shapes.iter().any(|shape| matches!(shape, Shape::Text { text, .. } if text.contains(part)))
    };
    let (few, many) = (of(10), of(500));
    assert!(has(&few, "9 000000000009 976.6 KiB") && !has(&few, "lane 1"));
    assert!(has(&many, "lane 4: 125 reads") && !has(&many, "lane 5") && has(&many, "Slowest layers"));
    assert!(many.height < few.height * 1.5, "{} {}", many.height, few.height);
    for picture in [&few, &many] {
        assert!(has(picture, "switch") && has(picture, "try-restart sshd.service") && has(picture, "network"));
        assert_eq!(fault(picture), None);
    }
}

#[test]
fn a_failure_is_in_the_head_and_names_are_escaped() {
    let message = format!("<registry> & \u{fffe}{}", "x".repeat(300));
    let error = Some(LastError { class: "network".into(), message, ..LastError::default() });
    let status = Status { state: State::Failed, error, ..Status::default() };
    let failed = Report { status, ..report(pivot(3)) };
    assert_eq!(fault(&layout(&failed)), None);
    let svg = plot(&failed);
    assert!(svg.contains("&lt;registry&gt; &amp; ?xxx") && !svg.contains("<registry>"));
    assert!(svg.contains("prefers-color-scheme: dark"));
}

#[test]
fn an_empty_report_has_a_picture() {
    assert_eq!(fault(&layout(&Report::default())), None);
}

/// Measures the texts as the browser draws them, and reads the colours of the background and of a text.
const MEASURE: &str = "<script>
  const texts = [...document.querySelectorAll('text')].map(text => [text, text.getBoundingClientRect()]);
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4;
  const faults = texts.flatMap(([text, a], at) => texts.slice(at + 1).filter(([, b]) => meet(a, b))
    .map(([other]) => text.textContent + ' / ' + other.textContent));
  const fill = name => getComputedStyle(document.querySelector(name)).fill;
  document.body.dataset.result = [texts.length, fill('.back'), fill('.title'), faults.join('|')].join(';');
</script>";

/// `make check` and `make check-browser` run it and install the browser. `PIVOT_PICTURES` names a directory that gets the pictures.
#[test]
#[ignore = "needs a browser: make check-browser"]
fn a_browser_draws_the_picture_in_light_and_dark() {
    let temp = tempfile::tempdir().unwrap();
    let kept = std::env::var_os("PIVOT_PICTURES").map(std::path::PathBuf::from);
    for layers in [10, 500] {
        let svg = plot(&report(pivot(layers)));
        if let Some(directory) = &kept {
            std::fs::write(directory.join(format!("{layers}.svg")), &svg).unwrap();
        }
        let page = temp.path().join(format!("{layers}.html"));
        let inline = svg.split_once("?>").unwrap().1;
        std::fs::write(&page, format!("<!DOCTYPE html><meta charset=utf-8><body>{inline}{MEASURE}")).unwrap();
        for (scheme, back, text) in
            [("1", "rgb(255, 255, 255)", "rgb(28, 31, 35)"), ("0", "rgb(22, 24, 28)", "rgb(230, 232, 235)")]
        {
            let browser = std::process::Command::new("chromium-headless-shell")
                .args(["--no-sandbox", "--disable-gpu", "--dump-dom"])
                .arg(format!("--blink-settings=preferredColorScheme={scheme}"))
                .arg(&page)
                .output()
                .expect("run chromium-headless-shell");
            let document = String::from_utf8(browser.stdout).unwrap();
            let result = document.split_once("data-result=\"").expect(&document).1.split('"').next().unwrap();
            let count = svg.matches("<text ").count();
            assert_eq!(result, format!("{count};{back};{text};"), "{layers} layers: texts that overlap are last");
        }
    }
}

fn timelines() -> impl Strategy<Value = Timeline> {
    let subject = prop::sample::select(vec![
        Subject::Phase,
        Subject::Wait,
        Subject::Step,
        Subject::Mount,
        Subject::Hook,
        Subject::Job,
        Subject::Undo,
        Subject::UndoStep,
    ]);
    let result = prop::sample::select(vec![None, Some(SpanResult::Done), Some(SpanResult::Failed)]);
    let time = prop_oneof![0u64..200_000, 0u64..100_000_000];
    let span = (subject, ".{0,60}", time.clone(), time.clone(), result.clone());
    let layer = (0usize..600, time.clone(), time, result);
    (prop::collection::vec(span, 0..120), prop::collection::vec(layer, 0..80)).prop_map(|(spans, layers)| {
        let mut timeline = Timeline::default();
        for (subject, name, start, length, result) in spans {
            timeline.begin(subject, name.clone(), start);
            if let Some(result) = result {
                timeline.end(subject, Some(&name), start + length, result);
            }
        }
        let layers = layers.into_iter().map(|(index, start_ms, length, result)| {
            let fetch = Work { start_ms, end_ms: start_ms + length, bytes: length, cpu_ms: None };
            let write = result.map(|_| Work { end_ms: start_ms + 2 * length, cpu_ms: Some(length), ..fetch });
            LayerRead { index, digest: "sha256:0".into(), size: length, fetch, decompress: write, write, result }
        });
        timeline.layers = layers.collect();
        timeline
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_text_overlaps_another_and_all_are_inside(timeline in timelines()) {
        let report = report(timeline);
        prop_assert_eq!(fault(&layout(&report)), None);
    }
}
