"""Writes tokenizer_strings.txt: one JSON string a line, the same for the same seed. Run it from anywhere."""

# ruff: noqa: SIM905, RUF005  (split words read better here than two hundred quoted ones)

from __future__ import annotations

import json
import random
import string
import unicodedata
from pathlib import Path

SEED = 20260101
COUNT = 2400
PHRASES = [
    "All human beings are born free and equal in dignity and rights.",
    "They're endowed with reason; we've said it'll do, I'd think, she's sure he can't. DON'T SHOUT! It'S oDd.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren, Straßenfußgänger übrigens auch.",
    "Tous les êtres humains naissent libres et égaux; l'œuvre d'aujourd'hui, ça, où?",
    "Todos los seres humanos nacen libres. ¿Qué año? ¡Señor!",
    "Todos os seres humanos nascem livres: ação, coração, pão.",
    "Wszyscy ludzie rodzą się wolni, żółć, źdźbło, łódź.",
    "Všichni lidé rodí se svobodní a sobě rovní, příliš žluťoučký kůň.",
    "Minden emberi lény szabadon születik, árvíztűrő tükörfúrógép.",
    "Bütün insanlar hür doğar; ISPARTA'da İstanbul'un ışığı.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng.",
    "Все люди рождаются свободными и равными в своём достоинстве.",
    "Всі люди народжуються вільними, її ґанок, п'ять об'єктів.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար։",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი.",
    "כל בני האדם נולדו בני חורין ושווים בערכם.",
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق، أليس كذلك؟",
    "تمام انسان‌ها آزاد به دنیا می‌آیند.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা নিয়ে জন্মগ্রহণ করে।",
    "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน",
    "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် မွေးဖွားလာသူများ ဖြစ်သည်။",
    "ມະນຸດທຸກຄົນເກີດມາມີສິດເສລີພາບ",
    "មនុស្សទាំងអស់ កើតមកមានសេរីភាព",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心！",
    "人皆生而自由；在尊嚴及權利上均各平等。",
    "すべての人間は、生まれながらにして自由であり、カタカナとひらがなも。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው።",
    "Binadamu wote wamezaliwa huru, hadhi na haki zao ni sawa.",
    "Хүн бүр төрж мэндлэхэд эрх чөлөөтэй.",
]
CODE = [
    "def f(x: int) -> int:\n    return x ** 2  # comment\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; }",
    "if (!ok && (err != null || a<=b)) {\r\n\tthrow new Error(`bad ${x}`);\r\n}",
    "SELECT * FROM \"t\" WHERE id>=10 AND name LIKE '%x_y%';",
    '<div class="a-b"><p>Hi &amp; bye</p></div><!-- c -->',
    '{"key": [1, 2.5e-10, true, null], "é": "\\u00e9"}',
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 42); }',
    'let v: Vec<&\'a str> = s.split("::").collect();',
    "\\begin{equation} \\frac{a}{b} \\sum_{i=1}^{n} x_i^2 \\end{equation}",
    "git commit -m 'fix: #123' && git push --force-with-lease origin HEAD~1",
    "https://example.org/a/b?c=d&e=f#g user@mail.example C:\\Windows\\x.txt /usr/bin/env",
    "@decorator\nasync def g():\n        await h(**kw, *a)\n\n\n\nclass A(B):\n  pass",
]
NUMBERS = (
    "0 7 12 123 1234 12345 123456 1234567 12345678901234567890 3.14159 1,000,000.50 -273.15 1e-9 "
    "2024-12-31T23:59:59Z 50% $9.99 €1.234,56 №5 ½ ²³ Ⅳ ٣٤٥ १२३ １２３ 0xDEADBEEF v1.2.3-rc4 192.168.0.1 "
    "3x4=12 a1b2c3 10th 1st2nd x²+y² "
).split() + ["+49 (0)30 123-456"]
SPACES = " |  |   |    |\t|\t\t|\n|\n\n|\n\n\n|\r\n|\r\n\r\n| \n|\n | \n |\t \n\t|\u00a0|\u2003|\u3000".split("|")
SIGNS = (
    list(string.punctuation)
    + (
        "... !!! ?! -- -> => == != // /* */ :: … – — “x” ‘y’ «z» „q“ 、 。 ！ ？ 「 」 ・ • → ≤ ∑ √ ∞ ° © ™ § ¶ † ± "
        "× ÷ € £ ¥ || && ## 's 'RE "
    ).split()
)
EMOJI = "😀 😂🤣 👍🏽 👩‍💻 👨‍👩‍👧‍👦 🇩🇪🇫🇷 ❤️ ☕ ✅ 🚀🚀🚀 1️⃣ 🏳️‍🌈".split() + ["(╯°□°)╯︵ ┻━┻"]
SPECIALS = "<|endoftext|> <s> </s> <unk> [CLS] [SEP] [MASK] <|im_start|> <tool_call> <| |> <0x0A> ##ing ▁ Ġ".split()


def main() -> None:
    rng = random.Random(SEED)
    words = [w for p in PHRASES for w in p.split()]
    found = ["", *PHRASES, *CODE, *NUMBERS, *SPACES, *SIGNS, *EMOJI, *SPECIALS, *words[:250]]
    pools = [
        words,
        words,
        words,
        NUMBERS,
        SPACES,
        SIGNS,
        EMOJI,
        SPECIALS,
        [c for code in CODE for c in code.split(" ")],
    ]
    seen = set()
    strings = []
    while len(strings) < COUNT:
        if found:
            text = found.pop(0)
        else:
            parts = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 7))]
            text = rng.choice(["", " ", " ", "\n"]).join(parts)
        text = unicodedata.normalize("NFC", text)
        if text not in seen:
            seen.add(text)
            strings.append(text)
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in strings)
    Path(__file__).with_name("tokenizer_strings.txt").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
