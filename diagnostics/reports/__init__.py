"""Reports: records and run logs in, tables, figures and pages out. No torch; numpy and vl-convert only where drawn."""
