"""Texts by which tokenizers are compared: two that give all of them the same ids are the same."""

# ruff: noqa: RUF001

WORDS = """\
Call me Ishmael. Some years ago, never mind how long precisely, having little or no money.
The quick brown fox jumps over the lazy dog; THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG!
It's what we'd said they'll do, isn't it? I'm sure you've heard; he'd've gone, y'all.
Electroencephalographically, the antidisestablishmentarian floccinaucinihilipilification ended.
internationalization misunderstanding counterrevolutionaries pneumonoultramicroscopic
In 1851, 3.14159 of 1,234,567 readers (0.02%) paid $12.50, or 9:45 a.m. on 2024-02-29.
0 1 12 123 1234 12345 123456 1234567890 00012 1e-6 -42 +7 0xDEADBEEF 0b1010 192.168.0.1
https://www.example.com/path/to/page.html?query=value&other=%20#fragment mail@example.org
def tokenize(text: str, *, bos: bool = True) -> list[int]:  # the ids of a text
for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; if (sum != 0 && !done) return; }
SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name ORDER BY 2 DESC LIMIT 10;
<div class="note" id='x1'><p>It &amp; that</p></div><!-- a comment --><br/>
{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}, "empty": {}}
\\frac{\\partial u}{\\partial t} = \\alpha \\nabla^2 u + \\sum_{i=1}^{n} x_i^2 \\leq \\int_0^1 e^x
#include <stdio.h> int main(void) { printf("%d\\n", 1 << 4); return x->y ? ~z : w | v ^ u; }
let mut v: Vec<&'a str> = s.split("::").map(|t| t.trim()).filter(|t| !t.is_empty()).collect();
npm install --save-dev @types/node@^18 && ./configure --prefix=$HOME/.local || exit 1
| a | b |---|---| **bold** _italic_ `code` [link](url) ~~gone~~ # Title ## Subtitle
camelCase snake_case kebab-case SCREAMING_CASE PascalCase dot.case path/case C++ C# .NET
...!!! ??? --- === *** ___ ### $$$ %%% ^^^ &&& +++ <<< >>> ((( ))) [[[ ]]] {{{ }}} ~~~ ``` '''
"quoted" 'single' “curly” ‘inner’ – — … «» • § ¶
naïve café résumé façade über Straße smørrebrød Łódź čeština İstanbul
Le cœur a ses raisons que la raison ne connaît point : à Paris, ça va très bien.
Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung.
¿Dónde está la biblioteca? ¡Mañana será otro día! O coração não mente. Perché no?
Все счастливые семьи похожи друг на друга; її мова, български.
Μῆνιν αειδε Θεά Πηληιάδεω Ἀχιλῆος
בראשית ברא אלהים السلام عليكم ورحمة الله
सभी मनुष\u094dयों को गौरव সমস\u09cdত தமிழ\u0bcd สวัสดีชาวโลก
天地玄黄，宇宙洪荒。人工智能正在改变世界。機器學習
吾輩は猫である。名前はまだ無い。コンピューター
나랏말이 중국과 달라 인공지능 기계 학습
∑ ∞ ≈ ≠ ≤ ∫ √ π ± × ÷ → ⇒ ∀ ∃ ∈ € £ ¥ © ® °
☃ 🐋 😀 👍🏽 👨\u200d👩\u200d👧 🇩🇪
e\u0301 cafe\u0301 A\u030a \u304b\u3099 \u1112\u1161\u11ab Å ﬁne ① ½ ＡＢＣ ㎡
""".splitlines()

SPACE_KINDS = (*" \n\t\r\u00a0\u3000\u2003\u200b\ufeff", "\r\n")
SPACES = (
    "",
    *(" " * number for number in (2, 3, 4, 7, 8, 15, 16, 33, 200)),
    *(
        text
        for space in SPACE_KINDS
        for text in (space, f"{space}a", f"a{space}", f"a{space}b", f"a{space * 2}b", f"a {space}b")
    ),
    "\v\f\x1c\x85\u2028\u2029 a\vb\fc\x85d\u2028e\u2029f\u200dg\u2060h",
    "  two  leading and trailing  ",
    " \n \t \r\n a \n\n\n  b\t\t c \n",
    "if x:\n    return y\n\n\tif z:\n\t\tpass\n        # eight\r\n",
    "\x00 \x01a\x7f\x1b[0m \x9f",
    "\u2581 a\u2581b \u2581",
    "a\n" * 40,
)

PROBES = (*WORDS, *(word for line in WORDS for word in line.split()), *SPACES)
