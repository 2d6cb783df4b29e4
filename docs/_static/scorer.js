/* Search puts a definition first: of a name its page, of a term the glossary, and of a question the FAQ. */
var Scorer = {
  objNameMatch: 110, // the index's entry of a term has 100
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: ([page, title, anchor, description, score]) => score + (page === "faq" || page === "glossary" ? 10 : 0),
};

/* `pv.fit` is how a name is written, and `pyro_vae.fit` how it is listed. */
document.addEventListener("DOMContentLoaded", () => {
  const perform = Search.performSearch;
  Search.performSearch = (query) => perform(query.replace(/\bpv\./g, ""));
});
