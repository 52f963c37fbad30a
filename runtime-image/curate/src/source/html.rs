//! The main text of an HTML page: its paragraphs without navigation, forms, scripts and link lists.
//!
//! The page is read as a stream of tags, never as a tree, so memory grows with its text alone. Text is cut into blocks at
//! block-level tags; regions that are boilerplate by tag, role or class are passed over; of the rest, blocks of running
//! text are kept, and short ones (headings, captions, lines of a dialogue) only beside kept ones (after jusText,
//! Pomikálek 2011).

use html5gum::emitters::default::DefaultEmitter;
use html5gum::{StartTag, Token, Tokenizer};

/// Regions without running text.
const SKIPPED_TAGS: [&str; 18] = [
    "script", "style", "noscript", "template", "svg", "math", "iframe", "object", "nav", "footer", "aside", "form",
    "button", "select", "textarea", "dialog", "figure", "title",
];
/// Roles of regions without running text.
const SKIPPED_ROLES: [&str; 7] = [
    "navigation",
    "banner",
    "contentinfo",
    "search",
    "complementary",
    "dialog",
    "menu",
];
/// Names in a class or id that mark boilerplate. Whole names: `nav` matches neither `naval` nor `no-nav`.
const SKIPPED_NAMES: [&str; 38] = [
    "nav",
    "navbar",
    "navigation",
    "navbox",
    "menu",
    "sidebar",
    "footer",
    "breadcrumb",
    "breadcrumbs",
    "cookie",
    "cookies",
    "cookie-banner",
    "cookie-consent",
    "cookie-notice",
    "consent",
    "advert",
    "ads",
    "promo",
    "share",
    "share-buttons",
    "social",
    "social-links",
    "social-share",
    "comments",
    "related",
    "related-articles",
    "related-posts",
    "pagination",
    "toc",
    "infobox",
    "editsection",
    "mw-editsection",
    "reflist",
    "references",
    "catlinks",
    "metadata",
    "noprint",
    "modal",
];
/// Last words of names that mark boilerplate whatever comes before, as in `site-footer`.
const SKIPPED_LAST_WORDS: [&str; 8] = [
    "nav",
    "navbar",
    "navigation",
    "menu",
    "sidebar",
    "footer",
    "breadcrumb",
    "breadcrumbs",
];
/// Words that make a name tell of a region instead of being one, as `has-sidebar` does.
const TELLING_WORDS: [&str; 6] = ["no", "not", "has", "with", "without", "hide"];
/// Tags that a class or id may turn into boilerplate; each needs an end tag, so a region has an end.
const REGION_TAGS: [&str; 11] = [
    "div", "section", "ul", "ol", "dl", "table", "header", "span", "sup", "details", "fieldset",
];
/// Tags that end a block.
const BLOCK_TAGS: [&str; 38] = [
    "address",
    "article",
    "blockquote",
    "body",
    "caption",
    "center",
    "dd",
    "details",
    "div",
    "dl",
    "dt",
    "fieldset",
    "figcaption",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "head",
    "header",
    "hr",
    "html",
    "li",
    "main",
    "ol",
    "p",
    "pre",
    "section",
    "summary",
    "table",
    "tbody",
    "td",
    "tfoot",
    "th",
    "thead",
    "tr",
    "ul",
];
/// Tags without content, which never open a region.
const VOID_TAGS: [&str; 13] = [
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr",
];
/// Words that make a block running text.
const RUNNING_WORDS: usize = 12;
/// Largest share of a block's characters in links, in running text.
const RUNNING_LINK_SHARE: f64 = 0.35;

#[derive(Debug, Default)]
struct Block {
    text: String,
    link_characters: usize,
    heading: bool,
    /// Part of a list or table: joined to its neighbours by one newline, not two.
    item: bool,
}

impl Block {
    fn link_share(&self) -> f64 {
        self.link_characters as f64 / self.text.chars().filter(|c| !c.is_whitespace()).count().max(1) as f64
    }

    fn is_running(&self) -> bool {
        self.text.split_whitespace().count() >= RUNNING_WORDS && self.link_share() <= RUNNING_LINK_SHARE
    }

    fn may_stand_beside(&self) -> bool {
        self.link_share() <= RUNNING_LINK_SHARE
    }
}

#[derive(Default)]
struct Extractor {
    /// Whether a class or id may mark a region as boilerplate.
    by_name: bool,
    blocks: Vec<Block>,
    current: Block,
    /// Tag of the region that is passed over, and how deep its name is nested.
    skipping: Option<(Vec<u8>, usize)>,
    links: usize,
    preformatted: usize,
    /// Index of the first block in, and after, the page's own `main` or else `article`.
    main: Option<(usize, usize)>,
    main_open: Option<(Vec<u8>, usize)>,
}

/// The main text of `html`; empty if it has none.
pub(super) fn main_text(html: &str) -> String {
    // A page may wrap all of itself in a name that elsewhere marks boilerplate.
    [true, false]
        .into_iter()
        .map(|by_name| extract(html, by_name))
        .find(|text| !text.is_empty())
        .unwrap_or_default()
}

fn extract(html: &str, by_name: bool) -> String {
    let mut extractor = Extractor {
        by_name,
        ..Extractor::default()
    };
    // Inside of scripts, styles and titles a `<` opens no tag.
    let mut emitter = DefaultEmitter::default();
    emitter.naively_switch_states(true);
    for Ok(token) in Tokenizer::new_with_emitter(html, emitter) {
        match token {
            Token::StartTag(tag) => extractor.open(&tag),
            Token::EndTag(tag) => extractor.close(&tag.name),
            Token::String(text) if extractor.skipping.is_none() => extractor.text(&String::from_utf8_lossy(&text)),
            _ => {}
        }
    }
    extractor.finish()
}

impl Extractor {
    fn open(&mut self, tag: &StartTag<()>) {
        let name = tag.name.as_slice();
        if let Some((region, depth)) = &mut self.skipping {
            *depth += usize::from(region == name);
            return;
        }
        if !is_one(name, &VOID_TAGS) && !tag.self_closing && is_boilerplate(tag, self.by_name) {
            self.end_block();
            self.skipping = Some((name.to_vec(), 1));
            return;
        }
        match name {
            b"br" => self.current.text.push('\n'),
            b"a" => self.links += 1,
            b"pre" => self.preformatted += 1,
            _ => {}
        }
        if is_one(name, &BLOCK_TAGS) {
            self.end_block();
            self.current.heading = matches!(name, [b'h', b'1'..=b'6']);
            self.current.item = matches!(name, b"li" | b"dt" | b"dd" | b"tr" | b"td" | b"th");
            // A block inside of a link's end tag that never came would be all link.
            self.links = 0;
        }
        let is_main = name == b"main" || attribute(tag, b"role").is_some_and(|role| role == "main");
        match &mut self.main_open {
            Some((main, depth)) => *depth += usize::from(main == name),
            None if is_main || (name == b"article" && self.main.is_none()) => {
                self.main_open = Some((name.to_vec(), 1));
                self.main = Some((self.blocks.len(), usize::MAX));
            }
            None => {}
        }
    }

    fn close(&mut self, name: &[u8]) {
        if let Some((region, depth)) = &mut self.skipping {
            *depth -= usize::from(region == name);
            if *depth == 0 {
                self.skipping = None;
            }
            return;
        }
        match name {
            b"a" => self.links = self.links.saturating_sub(1),
            b"pre" => self.preformatted = self.preformatted.saturating_sub(1),
            _ => {}
        }
        if is_one(name, &BLOCK_TAGS) {
            self.end_block();
        }
        if let Some((main, depth)) = &mut self.main_open {
            *depth -= usize::from(main == name);
            if *depth == 0 {
                self.main_open = None;
                self.main = self.main.map(|(start, _)| (start, self.blocks.len()));
            }
        }
    }

    fn text(&mut self, text: &str) {
        if self.links > 0 {
            self.current.link_characters += text.chars().filter(|c| !c.is_whitespace()).count();
        }
        if self.preformatted > 0 {
            self.current.text.push_str(text);
            return;
        }
        for c in text.chars() {
            match c.is_whitespace() {
                false => self.current.text.push(c),
                true if !self.current.text.is_empty() && !self.current.text.ends_with([' ', '\n']) => {
                    self.current.text.push(' ');
                }
                true => {}
            }
        }
    }

    fn end_block(&mut self) {
        let block = std::mem::take(&mut self.current);
        let lines: Vec<&str> = block.text.lines().map(str::trim_end).collect();
        let text = lines.join("\n").trim().to_owned();
        if !text.is_empty() {
            self.blocks.push(Block { text, ..block });
        }
    }

    fn finish(mut self) -> String {
        self.end_block();
        let main = self.main.map(|(start, end)| start..end.min(self.blocks.len()));
        // A page may mark as its main part something without running text; then the whole page is looked at.
        let blocks = main
            .and_then(|range| self.blocks.get(range))
            .filter(|blocks| blocks.iter().any(Block::is_running))
            .unwrap_or(&self.blocks);
        let running: Vec<bool> = blocks.iter().map(Block::is_running).collect();
        let mut text = String::new();
        let mut last_item = false;
        for (at, block) in blocks.iter().enumerate() {
            if !keeps(blocks, &running, at) {
                continue;
            }
            if !text.is_empty() {
                text.push_str(if block.item && last_item { "\n" } else { "\n\n" });
            }
            text.push_str(&block.text);
            last_item = block.item;
        }
        text
    }
}

/// Whether a block belongs to the text: it is running text, a heading over some, or a short block between.
fn keeps(blocks: &[Block], running: &[bool], at: usize) -> bool {
    /// Short blocks in a row that a text may hold, such as the lines of a dialogue.
    const REACH: usize = 4;
    if running[at] {
        return true;
    }
    if !blocks[at].may_stand_beside() {
        return false;
    }
    let after = running[at + 1..].iter().take(REACH).any(|&running| running);
    let before = running[..at].iter().rev().take(REACH).any(|&running| running);
    after && (before || blocks[at].heading)
}

fn is_boilerplate(tag: &StartTag<()>, by_name: bool) -> bool {
    let name = tag.name.as_slice();
    if is_one(name, &SKIPPED_TAGS) {
        return true;
    }
    if !is_one(name, &REGION_TAGS) {
        return false;
    }
    let skipped_role = attribute(tag, b"role").is_some_and(|role| SKIPPED_ROLES.contains(&role.as_str()));
    let hidden = tag.attributes.contains_key(b"hidden".as_slice());
    let named = by_name
        && [b"class".as_slice(), b"id"]
            .iter()
            .filter_map(|name| attribute(tag, name))
            .any(|names| names.split_whitespace().any(marks_boilerplate));
    skipped_role || hidden || named
}

fn marks_boilerplate(name: &str) -> bool {
    let mut words = name.split(['-', '_']);
    SKIPPED_NAMES.contains(&name)
        || (words
            .clone()
            .next_back()
            .is_some_and(|last| SKIPPED_LAST_WORDS.contains(&last))
            && !words.any(|word| TELLING_WORDS.contains(&word)))
}

fn attribute(tag: &StartTag<()>, name: &[u8]) -> Option<String> {
    tag.attributes
        .get(name)
        .map(|value| String::from_utf8_lossy(value).to_ascii_lowercase())
}

fn is_one(name: &[u8], names: &[&str]) -> bool {
    names.iter().any(|known| known.as_bytes() == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNNING: &str = "The Globe was built in 1599 from the timbers of an older theatre that stood in Shoreditch.";

    #[test]
    fn paragraphs_and_their_headings_are_kept_and_boilerplate_is_not() {
        let html = format!(
            r#"<!doctype html><html><head><title>T</title><style>p {{}}</style></head><body>
            <header><div class="site-nav"><a href=/>Home</a> <a href=/t>Tickets for every play this season</a></div></header>
            <h1>The &quot;Globe&quot;</h1><p>{RUNNING}<br>It   burned
            down.</p><ul id=main-menu><li><a href=/a>Some link with many words that looks like text but is not any</a></ul>
            <h2>Rebuilt</h2><p>{RUNNING}<script>var x = "<p>no</p>";</script><div hidden>Not shown.</div>
            <ul><li>One short item<li>Another item</ul><p>{RUNNING}</p>
            <p><a href=/x>Read also this other article about something else that happened in the town lately</a></p>
            <footer>All rights reserved by the company that owns this page and many others besides it.</footer></body></html>"#
        );
        let expected = format!(
            "The \"Globe\"\n\n{RUNNING}\nIt burned down.\n\nRebuilt\n\n{RUNNING}\n\nOne short item\nAnother item\n\n{RUNNING}"
        );
        assert_eq!(main_text(&html), expected);
    }

    #[test]
    fn the_main_part_wins_where_it_has_text() {
        let outside = "This outside paragraph is long enough to be running text, and yet is not of the main part.";
        let html = format!("<p>{outside}</p><main><div><p>{RUNNING}</p></div></main><p>{outside}</p>");
        assert_eq!(main_text(&html), RUNNING);
        let empty = format!("<main><p>Short.</p></main><p>{RUNNING}</p>");
        assert_eq!(main_text(&empty), RUNNING);
    }

    #[test]
    fn text_after_a_script_is_read_whatever_the_script_holds() {
        for inside in [
            "<script>for(i=0;i<n;i++){}</script>",
            "<script>var s='<!--'</script>",
            "<script>document.write('<p>no<\\/p>')</script>",
            "<style>a::before{content:'<b'}</style>",
            "<title>a <b or <!-- so</title>",
        ] {
            let html = format!("<p>{RUNNING}</p>{inside}<p>{RUNNING}</p>");
            assert_eq!(main_text(&html), format!("{RUNNING}\n\n{RUNNING}"), "{inside}");
        }
    }

    #[test]
    fn a_name_marks_boilerplate_as_a_whole_and_never_the_whole_page() {
        let wrapped = |name: &str| main_text(&format!("<p>{RUNNING}</p><div class=\"{name}\"><p>{RUNNING}</p></div>"));
        for name in ["nav", "wide site-footer", "main_nav", "cookie-banner", "mw-editsection"] {
            assert_eq!(wrapped(name), RUNNING, "{name}");
        }
        for name in [
            "overflow-hidden",
            "hidden md:block",
            "no-sidebar",
            "has-sidebar",
            "layout-with-right-sidebar",
            "nav-open",
            "naval",
        ] {
            assert_eq!(wrapped(name), format!("{RUNNING}\n\n{RUNNING}"), "{name}");
        }
        let whole = format!("<div class=left-sidebar><div><p>{RUNNING}</p></div></div>");
        assert_eq!(main_text(&whole), RUNNING);
    }

    #[test]
    fn any_bytes_are_read_without_harm() {
        for html in [
            "",
            "<",
            "<div",
            "</div></div>",
            "<p>\u{0}&#x110000;",
            "<!--",
            "<a><a><a>",
            &"<div>".repeat(50_000),
        ] {
            assert_eq!(main_text(html), "", "{:?}", &html[..html.len().min(20)]);
        }
    }
}
