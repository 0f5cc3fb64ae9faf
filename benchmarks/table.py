"""Write the tables of README.md from the rows in results/.

    python benchmarks/table.py
"""
import csv
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARK = '<!-- tables: written by table.py -->'
COLUMNS = dict(
    step='rung against seconds best ratio best_ratio cpu_ratio grad_error load_before',
    profile='step group seconds share share_of_peak',
    input='rung images_per_second images_per_cpu_second ratio best_ratio cpu_ratio load_before',
    memory='rung peak_MB ratio',
    gpu='stage check ok figures')
TITLES = dict(step='The step (`step.py`)', profile='Where its time goes (`profile_step.py`)',
              input='The input (`input.py`)', memory='Memory of head and loss (`memory.py`)',
              gpu='On a card (`gpu.py`)')
MACHINE = ('date', 'commit', 'gpu', 'cpu', 'threads', 'torch')


def run_of(row):
    "Return the sentence that says on what and with what a row was measured."
    where = ', '.join(f'{name} {row[name]}' for name in MACHINE if row.get(name))
    size = ', '.join(f'{name} {row[name]}' for name in ('device', 'precision', 'batch', 'images')
                     if row.get(name))
    return f'{size}; {where}; `{row["command"]}`'


def joined(rows):
    "Return one row for all figures of a check."
    checks = {}
    for row in rows:
        key = row['stage'], row['check'], run_of(row)
        joint = checks.setdefault(key, row | dict(figures=''))
        joint['figures'] += f'{", " if joint["figures"] else ""}{row["figure"]} {row["value"]}'
    return [*checks.values()]


def tables(name):
    "Return the Markdown tables of one file of results, one for each run."
    path = HERE / 'results' / f'{name}.csv'
    if not path.exists(): return ''
    with open(path, newline='') as file: rows = list(csv.DictReader(file))
    if name == 'gpu': rows = joined(rows)
    columns, text = COLUMNS[name].split(), f'## {TITLES[name]}\n\n'
    for run in dict.fromkeys(map(run_of, rows)):
        lines = [columns, ['---'] * len(columns)]
        lines += [[row[c] for c in columns] for row in rows if run_of(row) == run]
        text += run + '\n\n' + '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n\n'
    return text


def main():
    readme = HERE / 'README.md'
    head = readme.read_text().split(MARK)[0]
    readme.write_text(head + MARK + '\n\n' + ''.join(map(tables, COLUMNS)).rstrip() + '\n')


if __name__ == '__main__': main()
