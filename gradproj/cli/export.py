"""The command ``export``: rows as the ``.pt`` files of earlier GradProjLora code."""

from pathlib import Path

from gradproj.flags import parse
from gradproj.formatting import count, shown
from gradproj.maintenance.export import Export, ExportConfig, plan_export, write_export
from gradproj.store import ProjectionStore


def export_command(argv: list[str]) -> None:
    """Write the files and print where they are."""
    about = "Write ok rows and their sample ids as float32 .pt files of earlier GradProjLora code."
    (config,) = parse(argv, "gradproj export", ExportConfig, description=about)
    config.apply()
    with ProjectionStore(config.output) as store:
        export = plan_export(store, config)
        print("\n".join(export_lines(export, Path(config.to))), flush=True)
        files = write_export(store, config, export)
        for path in shown(files, export.n_files + 1, "export", "files"):
            last = path
    print(f"done; {last} describes the values")


def export_lines(export: Export, target: Path) -> list[str]:
    """Return the plan of an export as lines of text."""
    lines = [
        f"{count(export.n_files, 'file')} of at most {export.rows_per_file:,} rows: "
        f"{export.n_rows:,} ok rows of samples {export.start} to {export.stop - 1}, "
        f"{export.n_bytes / 1e6:,.1f} MB, to {target}"
    ]
    if export.left_out:
        counts = ", ".join(f"{n:,} {name}" for name, n in export.left_out.items())
        lines.append(f"left out: {counts}")
    return lines
