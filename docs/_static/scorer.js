/* Search puts a definition first: of a name its page, of a term the glossary, and of a question the FAQ. */
var Scorer = {
  objNameMatch: 120, // the index's entry of a term has 100
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: ([page, title, anchor, description, score]) => {
    if (/^Python (attribute|property|method)/.test(description ?? "")) return score - 20; // of some other definition
    return page === "faq" || page === "glossary" ? score + 10 : score;
  },
};

/* `pv.fit` is how a name is written, and `pyro_vae.fit` how it is listed. The theme loads this after `Search`. */
if (typeof Search !== "undefined") {
  const parse = Search._parseQuery;
  Search._parseQuery = (query) => parse(query.replace(/\bpv\./g, ""));
}
