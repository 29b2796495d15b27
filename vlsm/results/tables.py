"""Tables of texts in markdown, LaTeX and CSV, in which every name from a file is escaped."""

from vlsm.system.files import csv_text

BOLD, PLAIN = "\x02", "\x03"  # in a cell, begin and end bold letters
SPACES = {"\n": " ", "\r": " "}  # a line break would end the row
MARKDOWN = {**SPACES, **{sign: "\\" + sign for sign in r"\|*_<`&~"}, BOLD: "**", PLAIN: "**"}
TEX = {
    **SPACES,
    **{sign: "\\" + sign for sign in "{}$&#_%"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "†": r"$^\dagger$",
    "±": r"$\pm$",
    BOLD: r"\textbf{",
    PLAIN: "}",
}
CSV = {BOLD: "", PLAIN: "", "±": "+-"}
SIGNS = {"md": MARKDOWN, "tex": TEX, "csv": CSV}  # what stands for a sign


def format_rows(rows, text_format, notes=()):
    """Format rows of texts, the first of which is the head, as md, csv or tex (with booktabs).

    notes: lines below the table, which a csv file has no place for; they are not escaped.
    """
    signs = str.maketrans(SIGNS[text_format])
    notes = [" ".join(note.split()) for note in notes]
    rows = [[cell.translate(signs) for cell in row] for row in rows]
    if text_format == "csv":
        return csv_text(rows)
    numbers = len(rows[0]) - 2  # columns after the data set and the metric
    if text_format == "md":
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        lines = [head, "| --- | --- |" + " ---: |" * numbers, *body]
        lines += ["\n" + note for note in notes]
        return "\n".join([*lines, ""]).replace("](", r"]\(")  # no name is a link
    head, *body = [" & ".join(row) + r" \\" for row in rows]
    begin = r"\begin{tabular}{ll" + "r" * numbers + "}"
    lines = [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    lines += ["% " + note for note in notes]
    return "\n".join([*lines, ""]).replace("\n[", "\n{[}")  # a bracket after a row would be its argument
